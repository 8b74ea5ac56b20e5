"""Modules that are quantized inside: their parts are observed and converted one by one."""

from typing import Any

import torch
from torch import nn

from quanto_hf.eager.convert import convert
from quanto_hf.eager.modules import QConfigError
from quanto_hf.eager.modules.kept import as_parameter
from quanto_hf.eager.prepare import prepare
from quanto_hf.eager.verbs import prepare_qat


class QuantizedInside(nn.Module):
    """Base of the observed module of such a type, whose constructor takes the float one, and of the quantized module,
    which derives from the observed one."""

    @classmethod
    def from_float(cls, mod: Any) -> nn.Module:
        """The observed module of a float one, with its parts prepared: for training if ``mod`` is in training mode.

        Raises:
            QConfigError: ``mod`` has no qconfig.
        """
        qconfig: Any = getattr(mod, "qconfig", None)
        if qconfig is None:
            raise QConfigError(f"this {type(mod).__name__} has no qconfig")
        observed: Any = cls(mod).train(mod.training)
        observed.qconfig = qconfig
        if mod.training:
            return prepare_qat(observed, inplace=True)
        return prepare(observed, inplace=True)

    @classmethod
    def from_observed(cls, mod: nn.Module) -> nn.Module:
        """The quantized module that ``convert`` makes of an observed one."""
        new = convert(mod, inplace=False)
        new.__class__ = cls
        return new


def linear_of(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A linear layer with this weight and bias; Parameters are shared."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    linear._parameters.update(weight=as_parameter(weight), bias=as_parameter(bias))
    return linear
