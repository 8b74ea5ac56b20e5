"""The two ends of a quantized region."""

import torch
from torch import nn

from quanto_hf.eager.modules.on_grid import OnGrid
from quanto_hf.nn.observers import number


class Quantize(OnGrid):
    """Rounds a tensor to a grid. The result is a float tensor.

    Args:
        scale: step.
        zero_point: code of 0.
        dtype: number type: a torch dtype or a name.
        factory_kwargs: device of the buffers.

    Example:
        >>> Quantize(0.5, 2, "quint8")(torch.tensor([-3.0, 0.3, 0.7]))
        tensor([-1.0000,  0.5000,  0.5000])
    """

    def __init__(
        self,
        scale: float | torch.Tensor = 1.0,
        zero_point: int | torch.Tensor = 0,
        dtype: str | torch.dtype = "quint8",
        factory_kwargs: dict[str, torch.device] | None = None,
    ) -> None:
        super().__init__()
        kind = number(dtype)
        device = (factory_kwargs or {}).get("device")
        step = torch.as_tensor(scale, dtype=torch.float32, device=device)
        # a float is refused as one
        code = torch.float32 if isinstance(zero_point, float) else getattr(zero_point, "dtype", torch.int64)
        zero = torch.as_tensor(zero_point, dtype=code, device=device)
        self.set_qparams(step.reshape(1), zero.reshape(1), kind.low, kind.high, kind.name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` on the grid."""
        return self.on_grid(x)


class DeQuantize(nn.Module):
    """Marks the end of a quantized region. Values are floats already, so that it has nothing to do."""

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> "DeQuantize":
        """One that stands for a DeQuantStub."""
        return cls()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input."""
        return x
