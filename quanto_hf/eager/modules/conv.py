"""Convolutions of the eager mode."""

import torch
from torch import nn

from quanto_hf.eager.modules.kept import WithReLU
from quanto_hf.eager.modules.weighted import Stored, Weighted
from quanto_hf.nn.qconv import (
    QConv1d,
    QConv2d,
    QConv3d,
    QConvTranspose1d,
    QConvTranspose2d,
    QConvTranspose3d,
    conv_transpose,
)


class StoredConv(Stored):
    """Mixin of convolutions with stored weights."""

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The convolution of ``x``, shape (batch, channels, *image), with the padding of the module.

        Args:
            x: float input; the batch dimension may be absent.
            weight: shape (out, in / groups, *kernel), of the dtype of ``x``.
            bias: shape (out,), or None.
        """
        out: torch.Tensor = self._conv_forward(x, weight, bias)  # type: ignore[operator]
        return out


class StoredConvTranspose(Stored):
    """Mixin of transposed convolutions with stored weights."""

    def product(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output_size: list[int] | None = None
    ) -> torch.Tensor:
        """The transposed convolution of ``x``, shape (batch, channels, *image).

        Args:
            x: float input; the batch dimension may be absent.
            weight: shape (in, out / groups, *kernel), of the dtype of ``x``.
            bias: shape (out,), or None.
            output_size: size of the image that comes out; None is the smallest one.
        """
        return conv_transpose(self, x, weight, bias, output_size)


class StoredConv1d(StoredConv, nn.Conv1d):
    """``nn.Conv1d`` whose weight is float16, or has a zero point, or that is a reference."""


class Conv1d(Weighted, QConv1d):
    """``nn.Conv1d`` with an int8 weight, whose output is on the grid of an observer."""

    stored = StoredConv1d


class ConvReLU1d(WithReLU, Conv1d):
    """A convolution and a ReLU, of which only the output of the second is rounded."""


class StoredConvTranspose1d(StoredConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` whose weight is float16, or has a zero point, or that is a reference."""


class ConvTranspose1d(Weighted, QConvTranspose1d):
    """``nn.ConvTranspose1d`` with an int8 weight, whose output is on the grid of an observer."""

    stored = StoredConvTranspose1d
    row_axis = 1


class StoredConv2d(StoredConv, nn.Conv2d):
    """``nn.Conv2d`` whose weight is float16, or has a zero point, or that is a reference."""


class Conv2d(Weighted, QConv2d):
    """``nn.Conv2d`` with an int8 weight, whose output is on the grid of an observer."""

    stored = StoredConv2d


class ConvReLU2d(WithReLU, Conv2d):
    """A convolution and a ReLU, of which only the output of the second is rounded."""


class StoredConvTranspose2d(StoredConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` whose weight is float16, or has a zero point, or that is a reference."""


class ConvTranspose2d(Weighted, QConvTranspose2d):
    """``nn.ConvTranspose2d`` with an int8 weight, whose output is on the grid of an observer."""

    stored = StoredConvTranspose2d
    row_axis = 1


class StoredConv3d(StoredConv, nn.Conv3d):
    """``nn.Conv3d`` whose weight is float16, or has a zero point, or that is a reference."""


class Conv3d(Weighted, QConv3d):
    """``nn.Conv3d`` with an int8 weight, whose output is on the grid of an observer."""

    stored = StoredConv3d


class ConvReLU3d(WithReLU, Conv3d):
    """A convolution and a ReLU, of which only the output of the second is rounded."""


class StoredConvTranspose3d(StoredConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` whose weight is float16, or has a zero point, or that is a reference."""


class ConvTranspose3d(Weighted, QConvTranspose3d):
    """``nn.ConvTranspose3d`` with an int8 weight, whose output is on the grid of an observer."""

    stored = StoredConvTranspose3d
    row_axis = 1
