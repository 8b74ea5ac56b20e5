"""Activation functions whose output is on a grid: that of an observer, or one that the function is known for."""

import torch
from torch import nn

from quanto_hf.eager.modules.on_grid import OnGrid


class Activation(OnGrid):
    """What activation functions share."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The function, and the rounding of the output."""
        return self.on_grid(super().forward(input))


class Hardswish(Activation, nn.Hardswish):
    """``nn.Hardswish`` with a rounded output."""


class ELU(Activation, nn.ELU):
    """``nn.ELU`` with a rounded output."""


class LeakyReLU(Activation, nn.LeakyReLU):
    """``nn.LeakyReLU`` with a rounded output."""


class PReLU(Activation, nn.PReLU):
    """``nn.PReLU`` with a rounded output. Its weight stays float."""


class ReLU6(Activation, nn.ReLU6):
    """``nn.ReLU6``. Its input is on a grid already, and 0 is on every grid: only 6 may be off, and is rounded."""


class Dropout(nn.Dropout):
    """A dropout that lets everything pass, in training mode too."""

    @classmethod
    def from_float(cls, mod: nn.Dropout, use_precomputed_fake_quant: bool = False) -> "Dropout":
        """The same probability."""
        return cls(mod.p, mod.inplace)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The input."""
        return input


class KnownRange(Activation):
    """A function whose range is known. Without an observer it stays float: it may stand behind the last quantized
    layer, where rounding would only lose."""

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> nn.Module:  # type: ignore[override]
        """The rounded function, or ``mod`` itself if it was not observed."""
        return super().from_float(mod) if hasattr(mod, "activation_post_process") else mod


class Sigmoid(KnownRange, nn.Sigmoid):
    """``nn.Sigmoid`` with a rounded output."""


class Hardsigmoid(KnownRange, nn.Hardsigmoid):
    """``nn.Hardsigmoid`` with a rounded output."""


class Tanh(KnownRange, nn.Tanh):
    """``nn.Tanh`` with a rounded output."""


class Softmax(KnownRange, nn.Softmax):
    """``nn.Softmax`` with a rounded output."""
