"""What an error of the weight does to the outputs: the second moment of the inputs, and its factors."""

from dataclasses import dataclass

import torch

from quanto_hf.fit.aqlm.layout import Layout
from quanto_hf.fit.aqlm.loops import loops_on, total

# Share of the mean of the diagonal that is added to it. Inputs that the calibration never saw would cost nothing else.
DAMPING = 0.01


@dataclass(frozen=True)
class Metric:
    """The error of a row e of the weight is ``e @ hessian @ e``.

    Args:
        hessian: float32, shape (in_features, in_features), symmetric, positive definite.
        lower: Cholesky factor of the block of each column group, shape (column groups, in_group, in_group).
        inverse: the inverse of each factor, transposed.
    """

    hessian: torch.Tensor
    lower: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def of(cls, moment: torch.Tensor, layout: Layout) -> "Metric":
        """From the second moment of inputs, ``X.T @ X / n``.

        Raises:
            ValueError: it has values that are not finite, or is not a moment.
        """
        moment = moment.float()
        if not torch.isfinite(moment).all():
            raise ValueError("the second moment of the inputs has NaN or infinite values; are the inputs finite?")
        if (moment.diagonal() < 0).any():
            raise ValueError("the second moment of the inputs has a negative diagonal; give X.T @ X / n")
        mean = total(moment.diagonal().double()) / moment.shape[0]
        if mean == 0:
            raise ValueError("the second moment of the inputs is 0: no input reached this layer")
        scaled = (moment.double() / mean).float()
        hessian = (scaled + scaled.T) / 2
        hessian.diagonal().add_(DAMPING)
        columns, width = hessian.shape[0] // layout.in_group, layout.in_group
        blocks = hessian.view(columns, width, columns, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()
        lower, failed = torch.linalg.cholesky_ex(blocks)
        if failed.any():
            raise ValueError("a second moment has no negative eigenvalues, so this is not one; give X.T @ X / n")
        eye = torch.eye(width, dtype=torch.float64, device=blocks.device).expand_as(lower)
        inverse = torch.linalg.solve_triangular(lower, eye, upper=False).transpose(1, 2)
        return cls(hessian.contiguous(), lower.float().contiguous(), inverse.float().contiguous())

    def diagonal(self, layout: Layout) -> torch.Tensor:
        """The diagonal of the Hessian for each value of a group, shape (1, column groups, values)."""
        rows = self.hessian.diagonal().expand(layout.out_group, -1)
        return layout.to_groups(rows)

    def look_ahead(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The factors of ``hessian = V D V^T``: V unit upper block triangular, D block diagonal by column groups.

        D_j is what an error of column group j costs when all columns to its right may make up for it.

        Returns:
            V, shape (in_features, in_features), and the Cholesky factor of each block of D; None if the Hessian is too
            near to singular for float32.
        """
        columns, width, _ = self.lower.shape
        size = columns * width
        upper = torch.eye(size, device=self.hessian.device, dtype=torch.float32)
        weighted = self.hessian.new_zeros(size, size)  # (V D)^T
        factors, product = torch.empty_like(self.lower), loops_on(self.hessian.device).product
        for j in range(columns - 1, -1, -1):
            here, end = slice(j * width, (j + 1) * width), (j + 1) * width
            # what the groups to the right leave of the columns of this one, as rows: those above it, and its own block
            left = self.hessian[here, :end].clone()
            if end < size:
                left -= product(upper[here, end:].contiguous(), weighted[end:, :end])
            block = left[:, here].double()
            factor, failed = torch.linalg.cholesky_ex((block + block.T) / 2)
            if failed:
                return None
            factors[j] = factor
            weighted[here, :end] = left
            upper[: here.start, here] = torch.cholesky_solve(left[:, : here.start].double(), factor).T.float()
        return upper, factors


def large_first(diagonal: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The order of the column groups by the sum of their part of a diagonal, the largest first."""
    return diagonal.float().view(-1, layout.in_group).sum(1).argsort(descending=True, stable=True)
