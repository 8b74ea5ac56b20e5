"""Fits that keep the whole range: absmax (symmetric) and minmax (asymmetric)."""

import torch

from quanto_hf.fit.base import Fit, ScaleZero, register, stored_scale
from quanto_hf.fit.grid import Grid
from quanto_hf.fit.scales import ScaleType


def _range(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # 7 times faster than torch.aminmax along a dimension
    return values.amin(1, keepdim=True), values.amax(1, keepdim=True)


def symmetric_scale(values: torch.Tensor, grid: Grid, ratio: float = 1.0) -> torch.Tensor:
    """The scale at which the largest magnitude, times ``ratio``, is the grid's largest number.

    The grids of int4 and int2 reach one step further down than up (-8 to 7), so their scale takes the sign that puts
    the value of largest magnitude on the long side: llama.cpp's Q4_0 does the same.
    """
    low, high = _range(values)
    if -grid.lowest > grid.highest:
        return torch.where(-low >= high, low / grid.lowest, high / grid.lowest) * ratio
    return torch.maximum(-low, high) * (ratio / grid.highest)


def affine_scale_zero(
    values: torch.Tensor, grid: Grid, kind: ScaleType, ratio: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero that put the range of each group, shrunk by ``ratio`` about its middle, on the grid."""
    low, high = _range(values)
    constant = low == high
    # divided before the difference: high - low overflows for values near the largest float
    scale = (high / grid.highest - low / grid.highest) * ratio
    scale = stored_scale(torch.where(constant, low.abs(), scale), kind)
    zero = grid.highest / 2 - (high / 2 + low / 2) / scale
    # a constant group is its own scale, one step above zero or one below it
    return scale, kind.round(torch.where(constant, (low < 0).to(zero.dtype), zero))


@register
class Absmax(Fit):
    """The largest magnitude of a group is the largest number of the grid. Symmetric grids only."""

    name = "absmax"
    block_bytes = 26

    def refuses(self, grid: Grid) -> str | None:
        """Why the grid is refused, or None: asymmetric ones."""
        if grid.has_zero:
            return "fit='absmax' has no zero; choose symmetric=True, or fit='minmax', 'mse' or 'hqq'"
        return None

    def __call__(self, values: torch.Tensor, grid: Grid, kind: ScaleType) -> ScaleZero:
        """Scale of each row.

        Raises:
            ValueError: the grid is asymmetric.
        """
        if (reason := self.refuses(grid)) is not None:
            raise ValueError(reason)
        return stored_scale(symmetric_scale(values, grid), kind), None


@register
class Minmax(Fit):
    """Smallest and largest value of a group are the ends of the grid; on a symmetric grid the same as absmax."""

    name = "minmax"
    block_bytes = 26

    def __call__(self, values: torch.Tensor, grid: Grid, kind: ScaleType) -> ScaleZero:
        if not grid.has_zero:
            return Absmax()(values, grid, kind)
        return affine_scale_zero(values, grid, kind)
