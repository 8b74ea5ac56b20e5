"""Linear layers of the eager mode."""

import torch
import torch.nn.functional as F
from torch import nn

from quanto_hf.eager.modules.kept import WithReLU
from quanto_hf.eager.modules.weighted import Stored, Weighted
from quanto_hf.nn.qlinear import QLinear


class StoredLinear(Stored, nn.Linear):
    """A linear layer whose weight is float16, or has a zero point, or that is a reference."""

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x`` (..., in) times the transposed ``weight`` (out, in) plus ``bias`` (out,), shape (..., out)."""
        return F.linear(x, weight, bias)


class Linear(Weighted, QLinear):
    """A :class:`QLinear` with an int8 weight, whose output is on the grid of an observer."""

    stored = StoredLinear


class LinearReLU(WithReLU, Linear):
    """A linear layer and a ReLU, of which only the output of the second is rounded."""


class DynamicLinear(Linear):
    """A :class:`QLinear` with an int8 weight, whose inputs are rounded to int8 with a scale per token."""

    is_dynamic = True


class DynamicLinearReLU(WithReLU, DynamicLinear):
    """A :class:`DynamicLinear` and a ReLU."""
