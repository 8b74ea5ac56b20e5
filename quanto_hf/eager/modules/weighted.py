"""What linear layers and convolutions of the eager mode share: an int8 weight in the module that quanto_hf has for it,
any other in one with stored weights, and an output on the grid of an observer."""

from typing import Any, ClassVar

import torch
from torch import nn

from quanto_hf.eager.modules.kept import as_parameter, bare
from quanto_hf.eager.modules.on_grid import OnGrid
from quanto_hf.eager.modules.stored_weights import (
    INT8,
    StoredWeight,
    encoded,
    is_symmetric_int8,
    scale_axis,
    weight_observer,
)
from quanto_hf.nn.activation import fake_quantize_input
from quanto_hf.nn.observers import is_memoryless
from quanto_hf.nn.qconv import items
from quanto_hf.qtypes import qint8


class Weighted(OnGrid):
    """Mixin: how such a module is made, and what happens to its output."""

    # the class for weights that are not int8 without a zero point
    stored: ClassVar[type[Any]]
    # the dimension of the weight whose entries are rows of the stored one
    row_axis: ClassVar[int] = 0
    # a ReLU that is fused, before the output is rounded
    relu = False
    # round inputs to int8 with scales that are found for each, and outputs not at all
    is_dynamic = False
    is_reference = False

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> Any:
        """The quantized module of an observed, or fake-quantized, one.

        Args:
            mod: a float module, or a fused one whose first child is one.
            use_precomputed_fake_quant: take the scale that the fake quantization of the weight holds.

        Raises:
            RuntimeError: the observer of the output has seen nothing.
            QConfigError: weights are not stored as the qconfig wants.
        """
        inner: Any = inner_of(mod)
        observer = weight_observer(inner, use_precomputed_fake_quant)
        weight, bias = inner.folded() if hasattr(inner, "folded") else (inner.weight, inner.bias)
        axis = scale_axis(observer, weight.dim(), cls.row_axis)
        dynamic = cls.is_dynamic or has_dynamic_input(mod)
        if cls.is_reference or not is_symmetric_int8(observer) or axis != cls.row_axis:
            new = bare(cls.stored, inner)
            new.relu, new.is_reference = cls.relu, cls.is_reference
            new.register_parameter("bias", as_parameter(bias))
            new.hold("weight", weight, observer)
        else:
            new = _packed(cls, inner, weight.detach(), bias, observer)
            new.activations = qint8 if dynamic else None
        new.is_dynamic = dynamic
        if not dynamic:
            new.take_grid(mod)
        return new.train(mod.training)

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The product, the fused ReLU, and the rounding of the output."""
        out = super().forward(input, *args, **kwargs)
        return self.on_grid(out.relu() if self.relu else out)

    def plain(self, weight: torch.Tensor) -> nn.Module:
        """A float module with this weight, of the shape of the stored one; with a fused ReLU a sequence of the two."""
        module: nn.Module = super().plain(weight)  # type: ignore[misc]
        return nn.Sequential(module, nn.ReLU()) if self.relu else module


class Stored(StoredWeight, OnGrid):
    """Mixin of modules whose weight is float16, or has a zero point, or is a reference. The other base is the float
    module type."""

    relu = False
    is_dynamic = False

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The product, the fused ReLU, and the rounding of the output."""
        bias = self._parameters["bias"]
        bias = None if bias is None else bias.to(input.dtype)  # type: ignore[assignment]
        if self.is_dynamic and self.how("weight").dtype != "float16":
            # an image is rounded as a whole, as in the modules of quanto_hf
            flat = input if isinstance(self, nn.Linear) else items(input, len(self.kernel_size))  # type: ignore[arg-type]
            input = fake_quantize_input(flat, qint8).view_as(input)
        out = self.product(input, self.weight_of("weight", input.dtype), bias, *args, **kwargs)
        return self.on_grid(out.relu() if self.relu else out)

    def product(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The product of an input and the weight, both float and of one dtype, without rounding.

        Args:
            x: input in the shape that the float module takes.
            weight: in the shape of the float module's weight.
            bias: one value per output feature or channel, of the dtype of ``x``, or None.

        Returns:
            The output of the float module, of the dtype of ``x``.
        """
        raise NotImplementedError


def inner_of(mod: nn.Module) -> nn.Module:
    """The module that has the weight: of a fused one the first child."""
    if not isinstance(mod, nn.Sequential):
        return mod
    inner = mod[0]
    if getattr(inner, "qconfig", None) is None:
        inner.qconfig = mod.qconfig
    return inner


def has_dynamic_input(mod: nn.Module) -> bool:
    """Whether the observer, or the qconfig, asks for scales that are found when a tensor passes."""
    observer: Any = getattr(mod, "activation_post_process", None)
    if observer is None:
        qconfig: Any = getattr(mod, "qconfig", None)
        observer = qconfig.activation() if qconfig is not None and qconfig.activation is not None else None
    return bool(getattr(observer, "is_dynamic", False)) or is_memoryless(observer)


def _packed(cls: Any, inner: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None, observer: Any) -> Any:
    """A FROZEN module of the class, with this weight in int8."""
    new = cls.__new__(cls)
    nn.Module.__init__(new)
    for name in new.constants:
        setattr(new, name, getattr(inner, name))
    new._setup(INT8, weight.dtype)
    new._parameters["bias"] = as_parameter(bias)
    if weight.device.type == "meta":
        new.make_empty()
        return new
    matrix = new.to_matrix(weight)
    codes, scale, _ = encoded(matrix.float(), observer)
    stored = {"packed": codes, "scale": scale}
    new.weight_error = new.measure_error(matrix, stored)
    new.set_tensors(stored)
    return new
