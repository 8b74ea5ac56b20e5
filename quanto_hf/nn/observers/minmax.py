"""The smallest and the largest value, and their moving averages."""

from typing import Any

import torch

from quanto_hf.nn.observers.base import RangeObserver, register


@register("minmax")
class MinMaxObserver(RangeObserver):
    """Remembers the smallest and the largest value of all tensors.

    Args:
        memoryless: of the last tensor only.

    All others: see :class:`RangeObserver`.

    Example:
        >>> observer = MinMaxObserver(dtype="qint8", qscheme="per_tensor_symmetric")
        >>> _ = observer(torch.tensor([-1.0, 2.55]))
        >>> [float(value) for value in observer.calculate_qparams()]
        [0.0199..., 0.0]
    """

    def __init__(self, *args: Any, memoryless: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memoryless = memoryless
        self.register_buffer("min_val", self.eps.new_full((), float("inf")))
        self.register_buffer("max_val", self.eps.new_full((), float("-inf")))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Record ``x`` and return it. A tensor without elements changes nothing."""
        if x.numel():
            low, high = torch.aminmax(x.detach().to(self.min_val.dtype))
            self.update(low, high)
        return x

    def update(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Take in the range of one tensor."""
        if not self.memoryless:
            low, high = torch.minimum(low, self.min_val), torch.maximum(high, self.max_val)
        self.min_val.copy_(low)
        self.max_val.copy_(high)

    def reset(self) -> None:
        """Forget what was seen."""
        self.min_val.fill_(float("inf"))
        self.max_val.fill_(float("-inf"))


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
