"""The range that all but a small part of the values lie in."""

from typing import Any

import torch

from quanto_hf.nn.observers.base import register
from quanto_hf.nn.observers.histogram import HistogramObserver


@register("percentile")
class PercentileObserver(HistogramObserver):
    """Keeps a histogram, and cuts off the same part of the values at both ends of it.

    Args:
        percentile: part of the values, in percent, below the upper end of the range, and above the lower one.

    All others: see :class:`HistogramObserver`.

    Example:
        >>> observer = PercentileObserver(percentile=90, bins=1000)
        >>> _ = observer(torch.linspace(-1, 1, 10_001))
        >>> [round(float(end), 2) for end in observer.search()]
        [-0.8, 0.8]
    """

    def __init__(self, percentile: float = 99.99, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile={percentile} is not above 50 and at most 100")
        self.percentile = percentile

    def search(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The two ends, with values spread evenly over their bin."""
        sums = torch.cat([self.histogram.new_zeros(1), self.histogram.cumsum(0)]).double()
        part = self.percentile / 100
        wanted = sums[-1] * torch.tensor([1 - part, part], dtype=sums.dtype, device=sums.device)
        # the lower end of the first bin in which the sum is reached
        at = (torch.searchsorted(sums, wanted) - 1).clamp(0, self.bins - 1)
        share = (wanted - sums[at]) / (sums[at + 1] - sums[at]).clamp(min=1e-30)
        ends = self.min_val.double() + (at + share) * ((self.max_val - self.min_val).double() / self.bins)
        if part == 1:
            return self.min_val, self.max_val
        return ends[0].float(), ends[1].float()
