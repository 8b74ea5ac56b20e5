"""Where a quantized region starts and ends."""

from typing import Any

import torch
from torch import nn

__all__ = ["DeQuantStub", "QuantStub", "QuantWrapper"]


class _Stub(nn.Module):
    def __init__(self, qconfig: Any = None) -> None:
        super().__init__()
        if qconfig is not None:
            self.qconfig = qconfig

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input."""
        return x


class QuantStub(_Stub):
    """The start of a quantized region. ``prepare`` observes it, ``convert`` makes it round.

    Args:
        qconfig: of this stub; None is that of its parent.
    """


class DeQuantStub(_Stub):
    """The end of a quantized region. It is never observed.

    Args:
        qconfig: of this stub; None is that of its parent.
    """


class QuantWrapper(nn.Module):
    """A module between a QuantStub and a DeQuantStub.

    Args:
        module: its qconfig is that of the stubs.

    Example:
        >>> [name for name, _ in QuantWrapper(nn.Linear(2, 2)).named_children()]
        ['quant', 'dequant', 'module']
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        qconfig = getattr(module, "qconfig", None)
        self.quant, self.dequant, self.module = QuantStub(qconfig), DeQuantStub(qconfig), module
        self.train(module.training)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """The module's output for a rounded input."""
        out: torch.Tensor = self.dequant(self.module(self.quant(X)))
        return out
