"""Quantized modules with one weight, whose inputs may be rounded: how they are made and printed, and what those
multiply with that compute with a float copy of their rounded weight, which are all but the linear layers."""

from typing import Any

import torch
from torch import nn

from quanto_hf.fit import Fit
from quanto_hf.nn.activation import QuantizedInput
from quanto_hf.nn.autocast import autocasts
from quanto_hf.nn.learned import LearnedScales
from quanto_hf.qtypes import QType
from quanto_hf.schemes import Scheme


class RoundedModule(LearnedScales, QuantizedInput):
    """Mixin: how such a module is made, and what it multiplies with. The other base is the float module type."""

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        scheme: Scheme,
        activations: QType | None = None,
        fit: Fit | str | None = None,
        static: bool = False,
    ) -> Any:
        """A PREPARED module that shares its parameters with a float one.

        Args:
            module: the float module.
            scheme: how the weight is stored.
            activations: number type to which inputs are rounded, or None.
            fit: what finds the scales of the weight; None is the default of the scheme.
            static: whether inputs are rounded with one scale that calibration finds.
        """
        layer = cls.__new__(cls)
        layer._adopt(module, scheme, fit)
        layer.activations = activations
        if static:
            layer.make_static(device=layer.weight.device)
        return layer

    @property
    def rounds(self) -> bool:
        """Whether it computes with rounded numbers: not in state FLOAT."""
        return self.is_frozen or self.rounding

    def _operands(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight and bias to compute with, in the dtype of x unless autocast takes care of it.

        Raises:
            ValueError: x has no floating-point numbers; a weight as integers would be zeros.
        """
        if not x.is_floating_point():
            raise ValueError(f"{self} takes floating-point inputs, not {x.dtype}; convert them first")
        weight = self.from_matrix(self.round_weight(self.sources())) if self.rounds else self.weight
        bias = self.bias_held
        if autocasts(x):
            return weight, bias
        return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)

    def extra_repr(self) -> str:
        """As of the float module, and how the weight is stored."""
        return super().extra_repr() + f", weights={self.scheme}" + self._describe_input() + self._describe_state()
