"""The linear layer of GPT-2, whose weight has the inputs first."""

from typing import ClassVar

from torch import nn

from quanto_hf.nn.qlinear import LinearProduct
from quanto_hf.nn.registry import LOAD, QUANTIZE, register_qmodule
from quanto_hf.nn.slots import WEIGHT, Slot


@register_qmodule("transformers.pytorch_utils.Conv1D", by_default=[LOAD, QUANTIZE])
class QConv1D(LinearProduct):
    """``x @ weight + bias`` with a quantized weight of shape (nx, nf).

    A row of the stored matrix is an output, as of a linear layer: the weight is transposed when it is quantized, and
    back when it is read. Everything else is that of :class:`quanto_hf.nn.QLinear`. The class of a layer is made of this
    one and of ``Conv1D``, so that ``isinstance`` goes on working.

    Example:
        >>> from transformers.pytorch_utils import Conv1D
        >>> import quanto_hf
        >>> model = quanto_hf.freeze(quanto_hf.quantize(nn.Sequential(Conv1D(10, 128)), "int4"))
        >>> model[0]
        QConv1D(nf=10, nx=128, weights=int4 g64 asym)
        >>> tuple(model[0].weight.shape), tuple(model[0].weight_packed.shape)
        ((128, 10), (10, 64))
    """

    declared: ClassVar[tuple[Slot, ...]] = (Slot(WEIGHT, transposed=True),)
    constants: ClassVar[tuple[str, ...]] = ("nf", "nx")

    nf: int
    nx: int

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """Width of the input."""
        return self.nx

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """Width of the output."""
        return self.nf

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(nx, nf)"""
        return (self.nx, self.nf)

    def extra_repr(self) -> str:
        """Features, the scheme, and what happens to the input."""
        return f"nf={self.nf}, nx={self.nx}" + super().extra_repr()

    # Conv1D has one of its own
    __repr__ = nn.Module.__repr__
