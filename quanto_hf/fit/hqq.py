"""Half-quadratic quantization: a data-free fit of the zero to an error norm below 1, which forgives outliers."""

import torch

from quanto_hf.fit.base import Fit, ScaleZero, register
from quanto_hf.fit.grid import Grid
from quanto_hf.fit.ranges import affine_scale_zero
from quanto_hf.fit.scales import ScaleType


@register
class Hqq(Fit):
    """HQQ: minimise the l_p error, p < 1, over the zero, with the scale of the full range.

    Splits the error into a sparse part, found by generalised soft thresholding, and a rest whose best zero is a mean
    (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023,
    https://mobiusml.github.io/hqq_blog/). Asymmetric grids only.

    Args:
        p: the norm; smaller forgives larger outliers.
        beta: weight of the quadratic part.
        kappa: what beta is multiplied with after each iteration.
        iterations: upper bound; a group stops to change when its mean error no longer falls.
    """

    name = "hqq"

    def __init__(self, p: float = 0.7, beta: float = 10.0, kappa: float = 1.01, iterations: int = 20) -> None:
        self.p, self.beta, self.kappa, self.iterations = p, beta, kappa, iterations

    def refuses(self, grid: Grid) -> str | None:
        """Why the grid is refused, or None: symmetric ones have no zero to move."""
        if grid.has_zero:
            return None
        return (
            f"fit='hqq' moves the zero, and symmetric {grid.qtype} weights have none; choose fit='mse' or 'absmax', "
            "or int4 or int2 with symmetric=False"
        )

    def __call__(self, values: torch.Tensor, grid: Grid, kind: ScaleType) -> ScaleZero:
        """Scale and zero of each row.

        Raises:
            ValueError: the grid is symmetric.
        """
        if (reason := self.refuses(grid)) is not None:
            raise ValueError(reason)
        scale, zero = affine_scale_zero(values, grid, kind)
        best_zero, best_error = zero, torch.full_like(zero, torch.inf)
        beta, scaled = self.beta, values / scale
        for _ in range(self.iterations):
            numbers = grid.nearest_(scaled + zero)
            residual = values - (numbers - zero) * scale
            error = residual.abs().mean(1, keepdim=True)
            wins = error < best_error
            if not wins.any():
                break
            best_zero, best_error = torch.where(wins, zero, best_zero), torch.where(wins, error, best_error)
            sparse = self._shrink(residual, beta)
            zero = kind.round((numbers - (values - sparse) / scale).mean(1, keepdim=True))
            beta *= self.kappa
        return scale, best_zero

    def _shrink(self, residual: torch.Tensor, beta: float) -> torch.Tensor:
        """Generalised soft thresholding: sign(e) * max(0, |e| - |e| ** (p - 1) / beta)."""
        size = residual.abs()
        return residual.sign() * (size - size.clamp(min=1e-12).pow(self.p - 1) / beta).clamp_(min=0)

    def __repr__(self) -> str:
        return f"Hqq(p={self.p}, beta={self.beta}, kappa={self.kappa}, iterations={self.iterations})"
