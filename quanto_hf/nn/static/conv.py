"""Convolutions with stored weights, whose output is on the grid of an observer."""

from typing import Any

import torch
from torch import nn

from quanto_hf.nn.static.kept import bare
from quanto_hf.nn.static.linear import folded, split
from quanto_hf.nn.static.on_grid import OnGrid
from quanto_hf.nn.static.stored_weights import StoredWeights, weight_observer


class StoredConv(OnGrid, StoredWeights):
    """What convolutions of all dimensions share."""

    # a ReLU that is fused, before the output is rounded
    relu = False

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> "StoredConv":
        """The quantized convolution of an observed, or fake-quantized, one.

        Args:
            mod: a convolution, or a fused one whose first child is one.
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
        new: Any = bare(cls, inner)
        new.hold("weight", weight, observer)
        new.register_parameter("bias", bias)
        new.take_grid(outer)
        return new

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The convolution, the fused ReLU, and the rounding of the output."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        out = self._conv_forward(input, self.weight_of("weight", input.dtype), bias)  # type: ignore[operator]
        return self.on_grid(out.relu() if self.relu else out)

    @property
    def weight(self) -> torch.Tensor:
        """The weight as a float tensor."""
        return self.weight_of("weight")

    def extra_repr(self) -> str:
        """As of the float module, the weights, and the grid."""
        return f"{super().extra_repr()}, {self.weights_repr()}"


class Conv1d(StoredConv, nn.Conv1d):
    """``nn.Conv1d`` with stored weights."""


class Conv2d(StoredConv, nn.Conv2d):
    """``nn.Conv2d`` with stored weights."""


class Conv3d(StoredConv, nn.Conv3d):
    """``nn.Conv3d`` with stored weights."""


class ConvReLU1d(Conv1d):
    """A convolution and a ReLU, of which only the output of the second is rounded."""

    relu = True


class ConvReLU2d(Conv2d):
    """A convolution and a ReLU, of which only the output of the second is rounded."""

    relu = True


class ConvReLU3d(Conv3d):
    """A convolution and a ReLU, of which only the output of the second is rounded."""

    relu = True
