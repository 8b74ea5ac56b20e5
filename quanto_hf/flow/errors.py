"""How far numbers are from the wanted ones, summed exactly over as many tensors as come."""

import math
from dataclasses import dataclass

import torch

# Numbers that are turned into float64 at a time: 8 MB each of wanted and made ones.
BLOCK = 1 << 20


@dataclass
class Errors:
    """Sums from which the measures of an error follow, in float64. Several batches are one long tensor: the sums are
    added, not the ratios averaged.

    Example:
        >>> errors = Errors()
        >>> errors.add(torch.tensor([3.0, 3.9]), torch.tensor([3.0, 4.0]))
        >>> round(errors.sqnr, 2), round(errors.relative, 3), round(errors.largest, 3)
        (33.98, 0.02, 0.1)
    """

    wanted: float = 0.0
    """Sum of squares of the wanted numbers."""
    made: float = 0.0
    """Sum of squares of the numbers that came."""
    error: float = 0.0
    """Sum of squares of the differences."""
    product: float = 0.0
    """Sum of the products of both."""
    largest: float = 0.0
    """The largest difference; NaN if one is NaN."""
    count: int = 0
    """How many numbers there were."""

    def add(self, made: torch.Tensor, wanted: torch.Tensor) -> None:
        """Add tensors of the same shape; they may be on different devices.

        Raises:
            ValueError: the shapes differ.
        """
        # MPS has no float64
        device = torch.device("cpu") if made.device.type == "mps" else made.device
        if made.shape != wanted.shape:
            raise ValueError(f"tensors of one shape are compared, not {tuple(made.shape)} with {tuple(wanted.shape)}")
        flat, reference = made.detach().reshape(-1), wanted.detach().reshape(-1)
        for start in range(0, flat.numel(), BLOCK):
            m = flat[start : start + BLOCK].to(device, torch.float64)
            w = reference[start : start + BLOCK].to(device, torch.float64)
            e = m - w
            most = e.abs().amax()
            found = torch.stack([w.dot(w), m.dot(m), e.dot(e), m.dot(w), most]).tolist()
            self.wanted += found[0]
            self.made += found[1]
            self.error += found[2]
            self.product += found[3]
            # max() of Python loses a NaN that comes second
            self.largest = math.nan if math.isnan(found[4] + self.largest) else max(self.largest, found[4])
            self.count += m.numel()

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise in dB, 10 log10(||wanted||² / ||made - wanted||²): infinite without any error,
        and minus infinite if all wanted numbers are 0 and not all that came."""
        if self.error == 0:
            return math.inf
        ratio = self.wanted / self.error
        return 10 * math.log10(ratio) if ratio > 0 else (-math.inf if ratio == 0 else math.nan)

    @property
    def relative(self) -> float:
        """||made - wanted|| / ||wanted||."""
        if self.error == 0:
            return 0.0
        return math.sqrt(self.error / self.wanted) if self.wanted else math.inf

    @property
    def cosine(self) -> float:
        """Cosine of the angle between both; 1 without any error, 0 if only one of them is all zeros."""
        if self.error == 0:
            return 1.0
        size = math.sqrt(self.wanted) * math.sqrt(self.made)
        return self.product / size if size else 0.0


@dataclass
class Share:
    """Part of a whole, summed over tensors."""

    part: int = 0
    whole: int = 0

    def add(self, hit: torch.Tensor) -> None:
        """Add a tensor of truth values."""
        self.part += int(hit.sum())
        self.whole += hit.numel()

    @property
    def value(self) -> float | None:
        """Between 0 and 1; None of nothing."""
        return self.part / self.whole if self.whole else None
