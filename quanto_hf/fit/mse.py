"""A data-free search for the scale and zero with the smallest squared error."""

import torch

from quanto_hf.fit.base import Fit, ScaleZero, register, stored_scale
from quanto_hf.fit.grid import Grid
from quanto_hf.fit.ranges import affine_scale_zero, symmetric_scale
from quanto_hf.fit.scales import ScaleType
from quanto_hf.ops.scratch import scratch

# Rounds of least squares after it. Gaussian int2 g64: 0.3320 with none and 25 ratios, 0.3250 with 3, 0.3233 with 8.
ROUNDS = 5
# Share of the lost gain that MseGain gives back. KL of int2 on the bundled model and worst cosine on MiniLM: 0.247 and
# 0.603 with 0, 0.210 and 0.569 with 0.5, 0.202 and 0.482 with 1.
GAIN_BACK = 0.5


@register
class Mse(Fit):
    """Clip search, then alternating least squares.

    The best of a few clipped ranges is the start. Then codes and grid are improved in turn, as in k-means: with the
    codes fixed, the scale and zero of least squared error are those of a linear regression of the values on the
    codes (Lloyd, "Least squares quantization in PCM", 1982). A group keeps its start where that ends no better.
    """

    name = "mse"
    block_bytes = 26

    def __call__(self, values: torch.Tensor, grid: Grid, kind: ScaleType) -> ScaleZero:
        return search(values, grid, kind)[0]


@register
class MseGain(Fit):
    """The same, with half of the lost gain given back: the default of int2.

    The numbers of least squared error are shorter than the values: of a group with relative error e, the part along
    the values is 1 - e^2, 0.89 for 2 bits. Every layer would answer that much too small. A scale that is longer by half
    of it costs little error: on the bundled model the KL of int2 falls from 0.247 to 0.210 (docs/accuracy.md). With 4
    bits, where 1 - e^2 is 0.993, it changes nothing.
    """

    name = "mse_gain"
    block_bytes = 26

    def __call__(self, values: torch.Tensor, grid: Grid, kind: ScaleType) -> ScaleZero:
        (scale, zero), error = search(values, grid, kind)
        size = torch.linalg.vector_norm(values, dim=1, keepdim=True)
        # a group of zeros has no error and no size; where the error is all there is, the gain is left alone
        share = (error / size.clamp(min=torch.finfo(size.dtype).tiny)).square().clamp_(max=0.5)
        return stored_scale(scale * (1 + GAIN_BACK * share / (1 - share)), kind), zero


def search(values: torch.Tensor, grid: Grid, kind: ScaleType) -> tuple[ScaleZero, torch.Tensor]:
    """The scale and zero of :class:`Mse`, and the norm of the error of each group, shape (groups, 1)."""
    best, error = None, None
    for ratio in grid.qtype.start_ratios:
        best, error = _better(values, grid, _clipped(values, grid, kind, ratio), best, error)
    assert best is not None
    scale, zero = best
    for _ in range(ROUNDS):
        scale, zero = _regress(values, grid, scale, zero)
    scale = stored_scale(scale, kind)
    return _better(values, grid, (scale, None if zero is None else kind.round(zero)), best, error)


def _clipped(values: torch.Tensor, grid: Grid, kind: ScaleType, ratio: float) -> ScaleZero:
    if grid.has_zero:
        return affine_scale_zero(values, grid, kind, ratio)
    return stored_scale(symmetric_scale(values, grid, ratio), kind), None


def _better(
    values: torch.Tensor, grid: Grid, new: ScaleZero, old: ScaleZero | None, old_error: torch.Tensor | None
) -> tuple[ScaleZero, torch.Tensor]:
    """Per group, the one of two candidates with the smaller error, and that error."""
    (scale, zero), u = new, _scaled(values, *new)
    numbers = grid.nearest_(scratch("numbers", tuple(u.shape), torch.float32, u.device).copy_(u))
    error = torch.linalg.vector_norm(u.sub_(numbers), dim=1, keepdim=True) * scale.abs()
    if old is None or old_error is None:
        return new, error
    wins = error < old_error
    scale = torch.where(wins, scale, old[0])
    if zero is not None and old[1] is not None:
        zero = torch.where(wins, zero, old[1])
    return (scale, zero), torch.where(wins, error, old_error)


def _scaled(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """Values in grid units, in a reused buffer."""
    u = torch.div(values, scale, out=scratch("scaled", tuple(values.shape), torch.float32, values.device))
    return u if zero is None else u.add_(zero)


def _regress(values: torch.Tensor, grid: Grid, scale: torch.Tensor, zero: torch.Tensor | None) -> ScaleZero:
    """The scale and zero of least squared error for the codes that the present ones give.

    Where all codes of a group are equal there is no slope, and the scale stays.
    """
    numbers, count = grid.nearest_(_scaled(values, scale, zero)), values.shape[1]
    squares = torch.linalg.vector_norm(numbers, dim=1, keepdim=True).square()
    products = torch.linalg.vecdot(numbers, values).unsqueeze(1)
    if zero is None:
        return torch.where(squares > 0, products / squares, scale), None
    mean_number, mean_value = numbers.mean(1, keepdim=True), values.mean(1, keepdim=True)
    variance = squares / count - mean_number.square()
    slope = (products / count - mean_number * mean_value) / variance
    # n codes, one of them a step off the others, have a variance of (n - 1) / n^2
    scale = torch.where((variance > 0.5 / count) & (slope > 0), slope, scale)
    return scale, mean_number - mean_value / scale
