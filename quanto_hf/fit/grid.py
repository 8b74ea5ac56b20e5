"""The numbers that codes can stand for, and the nearest of them to a value."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from quanto_hf.ops.scratch import scratch
from quanto_hf.qtypes import QType

# Resolution of the lookup tables of nf4 and fp4.
CELLS = 1 << 16


@dataclass(frozen=True)
class Grid:
    """The grid of one number type, symmetric or with a zero.

    A value w is stored as the code of the grid number nearest to ``w / scale`` (symmetric) or ``w / scale + zero``.

    Args:
        qtype: the number type.
        symmetric: no zero: the grid of an integer type is ``qmin ... qmax``, else ``0 ... levels - 1``.
    """

    qtype: QType
    symmetric: bool = True

    @property
    def has_zero(self) -> bool:
        """Whether the grid is shifted by a zero."""
        return not self.symmetric

    @property
    def lowest(self) -> float:
        """Smallest number of the grid."""
        return 0.0 if self.has_zero else float(self.qtype.qmin)

    @property
    def highest(self) -> float:
        """Largest number of the grid."""
        return float(self.qtype.levels - 1) if self.has_zero else float(self.qtype.qmax)

    def nearest_(self, u: torch.Tensor) -> torch.Tensor:
        """Replace each value by the nearest grid number, in place.

        Args:
            u: float32, contiguous, any shape. For tables the border between two numbers is met to 1/65536 of the
                table's range.
        """
        if self.qtype.kind == "int":
            return u.round_().clamp_(self.lowest, self.highest)
        if self.qtype.kind == "float":
            assert self.qtype.float_dtype is not None
            # torch's cast turns what is too large into NaN
            return u.copy_(u.clamp_(self.lowest, self.highest).to(self.qtype.float_dtype))
        torch.index_select(self._table(u.device)[0], 0, self._cells(u), out=u.view(-1))
        return u

    def encode(self, u: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write the code of the nearest grid number to ``out``; overwrites ``u``.

        Args:
            u: float32, contiguous, any shape.
            out: the storage dtype of the number type, same shape.
        """
        if self.qtype.kind == "float":
            assert self.qtype.float_dtype is not None
            return out.copy_(u.clamp_(self.lowest, self.highest).to(self.qtype.float_dtype).view(torch.uint8))
        if self.qtype.kind == "table":
            return out.copy_(torch.index_select(self._table(u.device)[1], 0, self._cells(u)).view_as(u))
        u = self.nearest_(u)
        if self.symmetric and self.qtype.is_packed:
            u.sub_(self.lowest)
        # the same bits, and torch converts float32 to int8 8 times faster than to uint8
        out.view(torch.int8).copy_(u)
        return out

    def _cells(self, u: torch.Tensor) -> torch.Tensor:
        """Index of each value in the lookup tables: torch.bucketize takes 7 times as long as this and a lookup."""
        u.clamp_(self.lowest, self.highest).sub_(self.lowest).mul_((CELLS - 1) / (self.highest - self.lowest)).round_()
        cells = scratch("cells", tuple(u.shape), torch.int32, u.device).copy_(u).view(-1)
        # NaN is no integer, and an index out of range: it gets any cell, and is known by its scale, which is NaN too
        return cells.bitwise_and_(CELLS - 1)

    def _table(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return lookup_tables(self.qtype, device)


@lru_cache(maxsize=16)
def lookup_tables(qtype: QType, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest table value (float32), and its code (uint8), of each of ``CELLS`` evenly spaced values."""
    assert qtype.values is not None
    with torch.inference_mode(False):
        # on the CPU, whatever the default device is: the tables are kept
        values = torch.tensor(qtype.values, dtype=torch.float64, device="cpu")
        cells = torch.linspace(qtype.qmin, qtype.qmax, CELLS, dtype=torch.float64, device="cpu")
        # argmin takes the first of equal distances: +0 of fp4's two zeros
        codes = (cells[:, None] - values).abs().argmin(1)
        return values[codes].float().to(device), codes.to(torch.uint8).to(device)
