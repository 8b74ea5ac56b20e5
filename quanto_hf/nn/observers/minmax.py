"""The smallest and the largest value."""

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
