"""Convolutions whose weight is quantized."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from quanto_hf.nn.activation import fake_quantize_input
from quanto_hf.nn.registry import QUANTIZE, register_qmodule
from quanto_hf.nn.rounded import RoundedModule
from quanto_hf.nn.slots import WEIGHT, Slot

# what a float convolution has from its arguments, or derives from them
CONSTANTS = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "transposed", "output_padding",
    "groups", "padding_mode", "_reversed_padding_repeated_twice",
)  # fmt: skip


def items(x: torch.Tensor, dims: int) -> torch.Tensor:
    """The values of each item of an image of ``dims`` dimensions in a row; without a batch, x is one item."""
    return x.flatten(1 if x.dim() == dims + 2 else 0)


def conv_transpose(
    mod: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output_size: Any = None
) -> torch.Tensor:
    """What the transposed convolution ``mod`` computes, with another weight and bias."""
    dims = len(mod.kernel_size)
    padding = mod._output_padding(x, output_size, mod.stride, mod.padding, mod.kernel_size, dims, mod.dilation)
    function: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
    out: torch.Tensor = function(x, weight, bias, mod.stride, mod.padding, padding, mod.groups, mod.dilation)
    return out


class QuantizedConv(RoundedModule):
    """Mixin of convolutions with a quantized weight; the other base is the float one.

    A row of the stored weight is an output channel: its values over input channels and kernel. The weight is
    dequantized in each forward pass, so that a convolution takes less memory and no less time. With ``activations`` an
    input is rounded with one scale for each item of the batch, or with a static one.
    """

    constants: ClassVar[tuple[str, ...]] = CONSTANTS
    out_channels: int
    in_channels: int
    groups: int
    kernel_size: tuple[int, ...]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out_channels, in_channels / groups, *kernel_size)"""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As of the float convolution, with the rounded weight and input."""
        weight, bias = self._operands(input)
        out: torch.Tensor = self._conv_forward(self._round_image(input), weight, bias)  # type: ignore[operator]
        return out

    def _round_image(self, x: torch.Tensor) -> torch.Tensor:
        """x rounded as the layer says: channels and places of one item share a scale."""
        if self.activations is None or not self.rounds or self._observe(x):
            return x
        self._check_calibrated()
        flat = items(x, len(self.kernel_size))
        return fake_quantize_input(flat, self.activations, scale=self.static_scale).view_as(x)


class QuantizedConvTranspose(QuantizedConv):
    """The same for transposed convolutions. Their weight has the output channels second: a row of the stored weight is
    one of these, for all groups."""

    declared: ClassVar[tuple[Slot, ...]] = (Slot(WEIGHT, transposed=True),)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(in_channels, out_channels / groups, *kernel_size)"""
        return (self.in_channels, self.out_channels // self.groups, *self.kernel_size)

    def forward(self, input: torch.Tensor, output_size: Any = None) -> torch.Tensor:
        """As of the float convolution, with the rounded weight and input."""
        weight, bias = self._operands(input)
        return conv_transpose(self, self._round_image(input), weight, bias, output_size)


@register_qmodule(nn.Conv1d, by_default=[QUANTIZE])
class QConv1d(QuantizedConv, nn.Conv1d):
    """``nn.Conv1d`` with a quantized weight.

    Example:
        >>> from quanto_hf.schemes import make_scheme
        >>> layer = QConv1d.from_module(nn.Conv1d(4, 8, 3), make_scheme("int8"))
        >>> layer.freeze()
        >>> layer(torch.zeros(1, 4, 10)).shape, layer.weight_packed.shape
        (torch.Size([1, 8, 8]), torch.Size([8, 12]))
    """


@register_qmodule(nn.Conv2d, by_default=[QUANTIZE])
class QConv2d(QuantizedConv, nn.Conv2d):
    """``nn.Conv2d`` with a quantized weight."""


@register_qmodule(nn.Conv3d, by_default=[QUANTIZE])
class QConv3d(QuantizedConv, nn.Conv3d):
    """``nn.Conv3d`` with a quantized weight."""


@register_qmodule(nn.ConvTranspose1d)
class QConvTranspose1d(QuantizedConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with a quantized weight."""


@register_qmodule(nn.ConvTranspose2d)
class QConvTranspose2d(QuantizedConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with a quantized weight."""


@register_qmodule(nn.ConvTranspose3d)
class QConvTranspose3d(QuantizedConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with a quantized weight."""
