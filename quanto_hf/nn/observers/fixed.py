"""A scale and a zero point that are known beforehand."""

from typing import Any

import torch

from quanto_hf.nn.observers.base import Observer, register
from quanto_hf.nn.observers.number_types import scheme_name


@register("fixed")
class FixedQParamsObserver(Observer):
    """Answers with the scale and the zero point that it was given: outputs of a sigmoid are always in 0 to 1.

    Args:
        scale: step, a float.
        zero_point: the code of 0.
        dtype: number type.
        qscheme: a scheme with one scale for the tensor.
        quant_min: smallest code.
        quant_max: largest code.
        is_dynamic: must be False.

    Example:
        >>> FixedQParamsObserver(scale=1 / 256, zero_point=0).calculate_qparams()
        (tensor([0.0039]), tensor([0], dtype=torch.int32))
    """

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(
        self,
        scale: float,
        zero_point: int,
        dtype: Any = "quint8",
        qscheme: Any = "per_tensor_affine",
        quant_min: int = 0,
        quant_max: int = 255,
        is_dynamic: bool = False,
        factory_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(dtype)
        if is_dynamic:
            raise ValueError("a fixed scale cannot be dynamic")
        self.qscheme, self.quant_min, self.quant_max = scheme_name(qscheme), quant_min, quant_max
        device = (factory_kwargs or {}).get("device")
        self.register_buffer("scale", torch.tensor([scale], dtype=torch.float32, device=device))
        self.register_buffer("zero_point", torch.tensor([zero_point], dtype=torch.int32, device=device))

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What was given."""
        return self.scale, self.zero_point
