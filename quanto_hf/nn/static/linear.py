"""Linear layers of the eager mode: int8 weights in a QLinear, all others in a plain layer with stored weights."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from quanto_hf.nn.activation import fake_quantize
from quanto_hf.nn.observers import is_memoryless
from quanto_hf.nn.qlinear import QLinear
from quanto_hf.nn.static.kept import bare
from quanto_hf.nn.static.on_grid import OnGrid
from quanto_hf.nn.static.stored_weights import INT8, Held, StoredWeights, codes_of, is_symmetric_int8, weight_observer
from quanto_hf.qtypes import qint8


class Linear(OnGrid, QLinear):
    """A :class:`QLinear` with int8 weights, whose output is on the grid of an observer.

    ``from_float`` makes a :class:`StoredLinear` where weights are not symmetric int8.
    """

    # the activation that is fused, before the output is rounded
    relu = False
    # round inputs to int8 per token, and outputs not at all
    is_dynamic = False
    is_reference = False

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> "Linear | StoredLinear":  # type: ignore[override]
        """The quantized layer of an observed, or fake-quantized, linear layer.

        Args:
            mod: a linear layer, or a fused one whose first child is one.
            use_precomputed_fake_quant: take the scale that the fake quantization of the weight holds.

        Raises:
            RuntimeError: the observer of the output has seen nothing.
            QConfigError: weights are not stored as the qconfig wants.
        """
        outer, inner = split(mod)
        observer = weight_observer(inner, use_precomputed_fake_quant)
        if not hasattr(inner, "weight_fake_quant"):
            observer(inner.weight)
        weight, bias = folded(inner)
        dynamic = cls.is_dynamic or has_dynamic_input(outer)
        if cls.is_reference or not is_symmetric_int8(observer):
            new: Any = bare(StoredLinear, inner)
            new.is_reference, new.relu, new.is_dynamic = cls.is_reference, cls.relu, dynamic
            new.hold("weight", weight, observer)
            new.register_parameter("bias", bias)
        else:
            kind = {"scheme": INT8, "activations": qint8 if dynamic else None, "dtype": weight.dtype}
            new = cls(weight.shape[1], weight.shape[0], bias is not None, device="meta", **kind).train(mod.training)
            new.is_dynamic = dynamic
            new.set_tensors(_int8(weight, observer))
            new._parameters["bias"] = bias
        if not dynamic:
            new.take_grid(outer)
        return new

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The product, the fused activation, and the rounding of the output."""
        out = super().forward(input)
        return self.on_grid(out.relu() if self.relu else out)


class LinearReLU(Linear):
    """A linear layer and a ReLU, of which only the output of the second is rounded."""

    relu = True


class DynamicLinear(Linear):
    """A linear layer with int8 weights, whose inputs are rounded to int8 with a scale per token."""

    is_dynamic = True


class DynamicLinearReLU(DynamicLinear):
    """The same with a ReLU."""

    relu = True


class StoredLinear(OnGrid, StoredWeights, nn.Linear):
    """A linear layer whose weight is float16, or 8 bits with a zero point, or that is a reference."""

    relu = False
    is_dynamic = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The product, the fused activation, and the rounding of the output."""
        if self.is_dynamic and self.held["weight"].dtype != "float16":
            input = fake_quantize(input, qint8)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        out = F.linear(input, self.weight_of("weight", input.dtype), bias)
        return self.on_grid(out.relu() if self.relu else out)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weight as a float tensor."""
        return self.weight_of("weight")

    def extra_repr(self) -> str:
        """Features, weights, and the grid."""
        return f"{super().extra_repr()}, {self.weights_repr()}"


def split(mod: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The module that is observed, and the one inside of it that has the weight."""
    inner = mod[0] if isinstance(mod, nn.Sequential) else mod
    if getattr(inner, "qconfig", None) is None and inner is not mod:
        inner.qconfig = mod.qconfig
    return mod, inner


def folded(mod: nn.Module) -> tuple[torch.Tensor, nn.Parameter | None]:
    """Weight and bias, into which the batch norm of a fake-quantized module is folded."""
    fold: Any = getattr(mod, "folded", None)
    if fold is not None:
        return fold()
    weight: Any = mod.weight
    bias: Any = mod.bias
    return weight, None if bias is None else nn.Parameter(bias.detach(), bias.requires_grad)


def has_dynamic_input(mod: nn.Module) -> bool:
    """Whether the qconfig asks for scales that are found when a tensor passes."""
    observer: Any = getattr(mod, "activation_post_process", None)
    if observer is None:
        qconfig: Any = getattr(mod, "qconfig", None)
        observer = qconfig.activation() if qconfig is not None and qconfig.activation is not None else None
    return bool(getattr(observer, "is_dynamic", False)) or is_memoryless(observer)


def _int8(weight: torch.Tensor, observer: Any) -> dict[str, torch.Tensor]:
    scale, zero = observer.calculate_qparams()
    rows = weight.detach().float()
    scale, zero = (value.detach().reshape(-1, 1).expand(rows.shape[0], 1).contiguous() for value in (scale, zero))
    how = Held(observer.dtype, tuple(weight.shape), 0, int(observer.quant_min), int(observer.quant_max))
    return {"packed": codes_of(rows, scale, zero, how), "scale": scale}
