"""Transposed convolutions with stored weights, whose output is on the grid of an observer."""

import torch
import torch.nn.functional as F
from torch import nn

from quanto_hf.nn.static.conv import StoredConv


class StoredConvTranspose(StoredConv):
    """What transposed convolutions of all dimensions share."""

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:  # type: ignore[override]
        """The transposed convolution, and the rounding of the output.

        Args:
            input: as of the float module.
            output_size: the size of the output, where the stride leaves more than one.
        """
        dims = len(self.kernel_size)  # type: ignore[arg-type]
        padding = self._output_padding(  # type: ignore[operator]
            input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
        )
        product = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        weight, bias = self.weight_of("weight", input.dtype), None if self.bias is None else self.bias.to(input.dtype)
        out = product(input, weight, bias, self.stride, self.padding, padding, self.groups, self.dilation)  # type: ignore[arg-type]
        return self.on_grid(out)


class ConvTranspose1d(StoredConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with stored weights."""


class ConvTranspose2d(StoredConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with stored weights."""


class ConvTranspose3d(StoredConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with stored weights."""
