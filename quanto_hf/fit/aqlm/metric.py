"""What an error of the weight does to the outputs: the second moment of the inputs, and its factors."""

from dataclasses import dataclass

import torch

from quanto_hf.fit.aqlm.layout import Layout

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
        diagonal = moment.diagonal()
        if (diagonal < 0).any():
            raise ValueError("the second moment of the inputs has a negative diagonal; give X.T @ X / n")
        # powers of two change no digit: the largest would overflow in float32 products, the smallest be lost
        mean = diagonal.double().mean()
        if mean == 0:
            raise ValueError("the second moment of the inputs is 0: no input reached this layer")
        scaled = (moment.double() / mean).float()
        hessian = (scaled + scaled.T) / 2
        hessian.diagonal().add_(DAMPING)
        columns, width = hessian.shape[0] // layout.in_group, layout.in_group
        blocks = hessian.view(columns, width, columns, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()
        lower = torch.linalg.cholesky(blocks)
        eye = torch.eye(width, dtype=torch.float64, device=blocks.device).expand_as(lower)
        inverse = torch.linalg.solve_triangular(lower, eye, upper=False).transpose(1, 2)
        return cls(hessian.contiguous(), lower.float().contiguous(), inverse.float().contiguous())

    def diagonal(self, layout: Layout) -> torch.Tensor:
        """The diagonal of the Hessian for each value of a group, shape (1, column groups, values)."""
        rows = self.hessian.diagonal().expand(layout.out_group, -1)
        return layout.to_groups(rows)
