"""A histogram of all values, and the range with the least squared error."""

import math
from functools import cache
from itertools import accumulate, repeat
from typing import Any

import torch

from quanto_hf.nn.observers.base import register
from quanto_hf.nn.observers.minmax import MinMaxObserver
from quanto_hf.nn.observers.number_types import number

# part of all values that a step of the search leaves out on one side
STEP = 1e-5


@cache
def _parts() -> tuple[torch.Tensor, torch.Tensor]:
    """After each number of steps: the part of all values below the range, and the part up to its end."""
    steps = round(1 / STEP)
    # added up one by one: torch's search compares with a sum that is rounded each time
    below = torch.tensor(list(accumulate(repeat(STEP, steps))), dtype=torch.float64, device="cpu")
    above = torch.tensor(list(accumulate(repeat(-STEP, steps), initial=1.0))[1:], dtype=torch.float64, device="cpu")
    return below, above


@register("histogram")
class HistogramObserver(MinMaxObserver):
    """Keeps a histogram, and cuts off ends of it while that makes the squared error of quantization smaller.

    The search is that of Caffe2's norm minimization, which torch's eager mode has too: values are spread evenly over
    their bin, and the error is the integral of the squared distance to the middle of the code's interval.

    Args:
        bins: of the histogram.
        upsample_rate: parts into which a bin is cut when the histogram moves to a wider range.

    All others: see :class:`RangeObserver`. Infinite values are left out of the histogram.

    Example:
        >>> observer = HistogramObserver()
        >>> _ = observer(torch.linspace(-1, 1, 10_000).pow(15) * 8)
        >>> [round(float(end), 1) for end in (observer.min_val, observer.max_val, *observer.search())]
        [-8.0, 8.0, -8.0, 7.9]
    """

    histogram: torch.Tensor

    def __init__(self, bins: int = 2048, *args: Any, upsample_rate: int = 16, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_dynamic:
            raise ValueError("a histogram of many tensors cannot be dynamic")
        self.bins, self.upsample_rate = bins, upsample_rate
        self.register_buffer("histogram", self.eps.new_zeros(bins))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the values of ``x`` to the histogram and return ``x``."""
        values = x.detach().to(self.histogram.dtype)
        values = values[values.abs() != math.inf]
        if values.numel():
            if self.memoryless:
                self.reset()
            self.add(values)
        return x

    def add(self, values: torch.Tensor) -> None:
        """Add finite values to the histogram."""
        low, high = torch.aminmax(values)
        old = (float(self.min_val), float(self.max_val))
        if old[0] <= old[1]:
            low, high = torch.minimum(low, self.min_val), torch.maximum(high, self.max_val)
        new = (float(low), float(high))
        counts = torch.histc(values, self.bins, min=new[0], max=new[1])
        if old == new:
            counts += self.histogram
        elif old[0] == old[1]:
            counts += torch.histc(self.min_val, self.bins, min=new[0], max=new[1]) * self.histogram.sum()
        elif old[0] < old[1]:
            counts += self._widened(old, new)
        self.histogram.copy_(counts)
        self.min_val.copy_(low)
        self.max_val.copy_(high)

    def _widened(self, old: tuple[float, float], new: tuple[float, float]) -> torch.Tensor:
        """The counts over a wider range: each bin is cut into parts, which go where their middle lies."""
        parts = self.bins * self.upsample_rate
        starts = torch.linspace(*old, parts + 1, dtype=torch.float32, device=self.histogram.device)[:-1]
        width = (self.max_val - self.min_val) / parts
        edges = torch.linspace(*new, self.bins + 1, dtype=torch.float32, device=self.histogram.device)
        where = torch.bucketize(starts + 0.5 * width, edges, right=True) - 1
        weights = self.histogram.repeat_interleave(self.upsample_rate) / self.upsample_rate
        return torch.bincount(where.clamp(0, self.bins - 1), weights, self.bins).to(self.histogram.dtype)

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of the range that the search finds."""
        self._check_seen(self.min_val, self.max_val)
        if self.histogram.device.type == "meta":
            # there are no values to search; shapes are all that counts
            return self.qparams_of(self.min_val, self.max_val)
        return self.qparams_of(*self.search())

    def search(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The range with the least error that is met when ends are cut off step by step."""
        sums = self.histogram.cumsum(0)
        total = float(self.histogram.sum())
        first, last, least = 0, self.bins - 1, math.inf
        lefts, rights = self._quantile_bins(sums, total)
        cut_left = cut_right = 0
        while cut_left < len(lefts) and cut_right < len(rights) and (cut_left + cut_right) * STEP < 1:
            left = min(max(lefts[cut_left], first), last)
            right = max(min(rights[cut_right], last), first)
            # the side where as many values take more room is cut
            if left - first > last - right:
                cut_left += 1
                candidate = (left, last)
            else:
                cut_right += 1
                candidate = (first, right)
            if candidate == (first, last):
                continue
            error = self._squared_error(*candidate)
            if error > least:
                break
            least, (first, last) = error, candidate
        width = (self.max_val - self.min_val) / self.bins
        return self.min_val + width * first, self.min_val + width * (last + 1)

    def _quantile_bins(self, sums: torch.Tensor, total: float) -> tuple[list[int], list[int]]:
        """For each number of steps: the first bin with at least that part of all values up to it, and the last bin
        with at most the rest."""
        below, above = _parts()
        sums = sums.cpu()
        lefts = torch.searchsorted(sums, (below * total).to(sums.dtype))
        rights = torch.searchsorted(sums, (above * total).to(sums.dtype), right=True) - 1
        return lefts.tolist(), rights.tolist()

    def _squared_error(self, first: int, last: int) -> float:
        """The squared error of all values if the codes cover the bins ``first`` to ``last``."""
        width = (float(self.max_val) - float(self.min_val)) / self.bins
        codes = 2 ** number(self.dtype).bits
        step = width * (last - first + 1) / codes
        if step == 0.0:
            return 0.0
        begin = (torch.arange(self.bins, dtype=torch.float32, device=self.histogram.device) - first) * width
        end = begin + width
        code_begin = torch.div(begin, step, rounding_mode="floor").clamp(0, codes - 1)
        code_end = torch.div(end, step, rounding_mode="floor").clamp(0, codes - 1)
        # integral of the squared distance, cut where the code changes: up to the end of the first code's interval, over
        # whole intervals, and from the start of the last code's interval
        half = step / 2
        head = half**3 - (begin - (code_begin + 0.5) * step) ** 3
        whole = (code_end - code_begin - 1) * (2 * half**3)
        tail = (end - (code_end + 0.5) * step) ** 3 + half**3
        return float(((head + whole + tail) / 3 * (self.histogram / width)).sum())

    def reset(self) -> None:
        """Forget what was seen."""
        super().reset()
        self.histogram.zero_()
