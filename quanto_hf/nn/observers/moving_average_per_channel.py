"""The moving average of the smallest and the largest value of each channel."""

from typing import Any

import torch

from quanto_hf.nn.observers.base import register
from quanto_hf.nn.observers.per_channel import PerChannelMinMaxObserver


@register("moving_average_per_channel")
class MovingAveragePerChannelMinMaxObserver(PerChannelMinMaxObserver):
    """Remembers the moving average of the smallest and of the largest value of each channel.

    Args:
        averaging_constant: weight of the newest tensor; with 1 only that one counts.

    All others: see :class:`PerChannelMinMaxObserver`.
    """

    def __init__(self, averaging_constant: float = 0.01, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.averaging_constant = averaging_constant

    def combine(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is remembered after one more tensor."""
        c = self.averaging_constant
        return self.min_val + c * (low - self.min_val), self.max_val + c * (high - self.max_val)
