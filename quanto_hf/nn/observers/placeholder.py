"""A number type without a range."""

from typing import Any

from quanto_hf.nn.observers.base import EPS, Observer, register
from quanto_hf.nn.observers.number_types import scheme_name


@register("placeholder")
class PlaceholderObserver(Observer):
    """Records nothing: it says which number type is wanted, for float16 or for scales that are found when a tensor
    passes.

    Args:
        dtype: number type.
        custom_op_name: kept, not used.
        compute_dtype: the older way to say ``is_dynamic``.
        quant_min: smallest code.
        quant_max: largest code.
        qscheme: quantization scheme.
        eps: smallest scale.
        is_dynamic: the scale will be found anew for each tensor.
    """

    def __init__(
        self,
        dtype: Any = "float32",
        custom_op_name: str = "",
        compute_dtype: Any = None,
        quant_min: int | None = None,
        quant_max: int | None = None,
        qscheme: Any = None,
        eps: float | None = None,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__(dtype, is_dynamic or compute_dtype is not None)
        self.qscheme = scheme_name("per_tensor_affine" if qscheme is None else qscheme)
        self.quant_min, self.quant_max, self.eps = quant_min, quant_max, EPS if eps is None else eps
        self.custom_op = custom_op_name

    def extra_repr(self) -> str:
        """Type, and whether scales are dynamic."""
        return f"dtype={self.dtype}, is_dynamic={self.is_dynamic}"
