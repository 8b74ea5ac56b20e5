"""The clipping threshold with the least squared error, for symmetric activations."""

from typing import Any

import torch

from quanto_hf.nn.observers.base import register
from quanto_hf.nn.observers.histogram import HistogramObserver
from quanto_hf.nn.observers.number_types import number

# thresholds that are tried, as parts of the largest magnitude
RATIOS = 100


@register("mse")
class MseObserver(HistogramObserver):
    """Keeps a histogram of magnitudes, and takes the threshold at which rounding and clipping cost least together.

    For symmetric grids: int8 and the 8-bit floats. Thresholds are tried one by one (Banner et al., "Post training
    4-bit quantization of convolutional networks for rapid-deployment", 2019, compute one for a known distribution).

    Args: see :class:`HistogramObserver`.

    Example:
        >>> observer = MseObserver(dtype="int8")
        >>> _ = observer(torch.cat([torch.linspace(-1, 1, 100_000), torch.tensor([40.0])]))
        >>> bool(observer.search()[1] < 40)
        True
    """

    schemes = ("per_tensor_symmetric",)

    def __init__(
        self,
        bins: int = 2048,
        dtype: Any = "qint8",
        qscheme: Any = "per_tensor_symmetric",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(bins, dtype, qscheme, *args, **kwargs)

    def add(self, values: torch.Tensor) -> None:
        """Add the magnitudes of finite values."""
        super().add(values.abs())

    def search(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The threshold, with both signs."""
        width = (self.max_val - self.min_val) / self.bins
        middles = self.min_val + width * (torch.arange(self.bins, dtype=torch.float32, device=width.device) + 0.5)
        ratios = torch.arange(1, RATIOS + 1, dtype=torch.float32, device=width.device) / RATIOS
        thresholds = ratios[:, None] * self.max_val
        steps = (thresholds / ((self.quant_max - self.quant_min) / 2)).clamp(min=1e-30)
        codes = (middles / steps).clamp(self.quant_min, self.quant_max)
        if number(self.dtype).is_float:
            codes = codes.to(getattr(torch, self.dtype)).to(codes.dtype)
        else:
            codes = codes.round()
        errors = ((codes * steps - middles).square() * self.histogram).sum(1)
        best = ratios[errors.argmin()] * self.max_val
        return -best, best
