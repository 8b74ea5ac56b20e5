"""Which parameters could be packed, and how many of their weights are."""

from collections.abc import Iterable
from typing import Any, NamedTuple


def is_matrix(name: str, shape: Iterable[int]) -> bool:
    """Whether a parameter is a matrix, or several, and so takes less memory packed: the weight of a layer, an
    embedding, a convolution, stacked experts, a raw parameter. A bias is none, and neither is a vector with dimensions
    of 1.

    Example:
        >>> is_matrix("conv.weight", (8, 3, 3, 3)), is_matrix("norm.weight", (64,)), is_matrix("token", (1, 1, 64))
        (True, False, False)
    """
    return sum(size > 1 for size in shape) > 1 and not name.endswith("bias")


class Packed(NamedTuple):
    """How much of a model is packed.

    Args:
        weights: number of the weights that are packed.
        eligible: number of the weights that could be: of all matrices (:func:`is_matrix`).

    Example:
        >>> str(Packed(900, 1_000)), Packed(0, 0).share
        ('packed: 90.0% of the weights that could be (900 of 1,000)', 0.0)
    """

    weights: int
    eligible: int

    @property
    def share(self) -> float:
        """From 0 to 1. All weights have one float dtype in nearly every model: it is the share of their bytes too."""
        return self.weights / self.eligible if self.eligible else 0.0

    def to_dict(self) -> dict[str, Any]:
        """In JSON types."""
        return {"share": round(self.share, 6), **self._asdict()}

    def __str__(self) -> str:
        return f"packed: {self.share:.1%} of the weights that could be ({self.weights:,} of {self.eligible:,})"
