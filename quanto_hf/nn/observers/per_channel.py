"""The smallest and the largest value of each channel, and their moving averages."""

from typing import Any

import torch

from quanto_hf.nn.observers.base import RangeObserver, register


@register("per_channel")
class PerChannelMinMaxObserver(RangeObserver):
    """Remembers the smallest and the largest value of each channel.

    Args:
        ch_axis: dimension of the channels.
        memoryless: of the last tensor only.

    All others: see :class:`RangeObserver`.

    Example:
        >>> observer = PerChannelMinMaxObserver(dtype="qint8", qscheme="per_channel_symmetric")
        >>> _ = observer(torch.tensor([[1.0, -1.0], [2.0, 0.0]]))
        >>> (observer.calculate_qparams()[0] * 127.5).tolist()
        [1.0, 2.0]
    """

    schemes = ("per_channel_affine", "per_channel_symmetric", "per_channel_affine_float_qparams")

    def __init__(
        self,
        ch_axis: int = 0,
        dtype: Any = "quint8",
        qscheme: Any = "per_channel_affine",
        *args: Any,
        memoryless: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(dtype, qscheme, *args, **kwargs)
        if self.is_dynamic:
            raise ValueError(f"{type(self).__name__} cannot be dynamic")
        self.ch_axis, self.memoryless = ch_axis, memoryless
        self.register_buffer("min_val", self.eps.new_empty(0))
        self.register_buffer("max_val", self.eps.new_empty(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Record ``x`` and return it. A tensor without elements changes nothing."""
        if x.numel():
            rows = x.detach().to(self.eps.dtype).movedim(self.ch_axis, 0)
            rows = rows.reshape(rows.shape[0], -1)
            self.update(rows.amin(1), rows.amax(1))
        return x

    def update(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Take in the ranges of the channels of one tensor."""
        if self.min_val.numel() and not self.memoryless:
            low, high = self.combine(low, high)
        if self.min_val.shape != low.shape:
            # a buffer of its own size, and not resize_, which inference tensors and compiled graphs refuse
            self.min_val, self.max_val = torch.empty_like(low), torch.empty_like(high)
        self.min_val.copy_(low)
        self.max_val.copy_(high)

    def combine(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is remembered after one more tensor."""
        return torch.minimum(low, self.min_val), torch.maximum(high, self.max_val)

    def reset(self) -> None:
        """Forget what was seen."""
        self.min_val, self.max_val = self.eps.new_empty(0), self.eps.new_empty(0)


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
