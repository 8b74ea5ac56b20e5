"""The moving average of the smallest and the largest value."""

from typing import Any

import torch

from quanto_hf.nn.observers.base import register
from quanto_hf.nn.observers.minmax import MinMaxObserver


@register("moving_average")
class MovingAverageMinMaxObserver(MinMaxObserver):
    """Remembers the moving average of the smallest and of the largest value of each tensor.

    Args:
        averaging_constant: weight of the newest tensor; with 1 only that one counts.

    All others: see :class:`RangeObserver`.

    Example:
        >>> observer = MovingAverageMinMaxObserver(averaging_constant=0.5)
        >>> for high in (1.0, 3.0):
        ...     _ = observer(torch.tensor([0.0, high]))
        >>> float(observer.max_val)
        2.0
    """

    def __init__(self, averaging_constant: float = 0.01, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.averaging_constant = averaging_constant
        if self.is_dynamic and averaging_constant != 1:
            raise ValueError(f"is_dynamic needs averaging_constant=1, not {averaging_constant}")

    def update(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Take in the range of one tensor: the first one as it is."""
        if self.memoryless:
            super().update(low, high)
            return
        # where, not if: a branch on a value would break the graph of torch.compile
        first = self.min_val > self.max_val
        for mean, new in ((self.min_val, low), (self.max_val, high)):
            mean.copy_(torch.where(first, new, mean + self.averaging_constant * (new - mean)))
