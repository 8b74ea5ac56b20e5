"""A module whose output is rounded to a grid that an observer has found."""

from typing import Any

import torch
from torch import nn

from quanto_hf.eager.grid import round_to_grid
from quanto_hf.eager.modules.errors import QConfigError
from quanto_hf.eager.modules.kept import KeepsNamed, bare
from quanto_hf.nn.observers import is_memoryless, number


class OnGrid(KeepsNamed):
    """A module with a scale and a zero point for its output.

    The names of both in the state dict are those of torch's eager mode: ``scale`` and ``zero_point``. A module that has
    no grid, because its qconfig says so, leaves its output as it is, or rounds it to float16.

    Args of ``from_float``:
        mod: a float module with an ``activation_post_process``.
        use_precomputed_fake_quant: has a meaning for weights only.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    output_dtype: str | None = None
    quant_min: int
    quant_max: int

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> "OnGrid":
        """The module with the tensors of ``mod``, and the grid of its observer.

        Raises:
            RuntimeError: the observer has seen nothing.
            QConfigError: there is no observer.
        """
        new: OnGrid = bare(cls, mod)
        new._parameters.update(mod._parameters)
        new._buffers.update(mod._buffers)
        new.take_grid(mod)
        return new

    def take_grid(self, mod: nn.Module) -> None:
        """Take over what the observer of ``mod`` has found.

        Raises:
            RuntimeError: the observer has seen nothing.
            QConfigError: there is no observer.
        """
        observer: Any = getattr(mod, "activation_post_process", None)
        wanted: Any = getattr(getattr(mod, "qconfig", None), "activation", None)
        if wanted is None:
            return
        if observer is None or (isinstance(observer, nn.Identity) and wanted is not nn.Identity):
            raise QConfigError(
                f"{type(mod).__name__} has a qconfig but no observer; call prepare and run the model before convert"
            )
        self.set_grid(observer)

    def set_grid(self, observer: Any) -> None:
        """Take over what an observer has found.

        Raises:
            RuntimeError: it has seen nothing.
        """
        dtype = getattr(observer, "dtype", "float32")
        if getattr(observer, "is_dynamic", False) or is_memoryless(observer):
            # scales are found for the input of the module
            return
        if dtype in ("float16", "float32", "bfloat16"):
            self.output_dtype = "float16" if dtype == "float16" else None
            return
        scale, zero_point = observer.calculate_qparams()
        self.set_qparams(scale, zero_point, observer.quant_min, observer.quant_max, dtype)

    def set_qparams(
        self, scale: torch.Tensor, zero_point: torch.Tensor, quant_min: int, quant_max: int, dtype: str
    ) -> None:
        """Round to this grid from now on.

        Raises:
            QConfigError: there is more than one scale, or the zero point is no integer.
        """
        if scale.numel() != 1 or zero_point.is_floating_point():
            raise QConfigError("activations have one scale and an integer zero point for the whole tensor")
        self.keep("scale", scale.detach().float().reshape(1).clone())
        self.keep("zero_point", zero_point.detach().to(torch.int32).reshape(1).clone())
        self.quant_min, self.quant_max, self.output_dtype = quant_min, quant_max, number(dtype).name

    def on_grid(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` rounded to the grid."""
        if self.output_dtype is None:
            return x
        if self.output_dtype == "float16":
            return x.half().to(x.dtype)
        return round_to_grid(x, self.scale, self.zero_point, self.quant_min, self.quant_max, None, self.output_dtype)

    def grid_repr(self) -> str:
        """The grid in a few words."""
        if self.output_dtype is None:
            return ""
        if self.output_dtype == "float16" or self.scale.device.type == "meta":
            return f"output={self.output_dtype}"
        return f"output={self.output_dtype}, scale={float(self.scale):.6g}, zero_point={int(self.zero_point)}"

    def extra_repr(self) -> str:
        """As of the float module, and the grid."""
        return ", ".join(filter(None, (super().extra_repr(), self.grid_repr())))
