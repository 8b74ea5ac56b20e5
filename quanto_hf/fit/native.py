"""How the fits of this room are named to the native quantizer, which computes the same (quanto_hf/ops/cpu)."""

from functools import lru_cache

import torch

from quanto_hf.fit import mse
from quanto_hf.fit.base import Fit
from quanto_hf.fit.grid import CELLS, Grid, lookup_tables
from quanto_hf.fit.hqq import Hqq
from quanto_hf.fit.ranges import Absmax, Minmax
from quanto_hf.ops.cpu.quantize import NativeFit
from quanto_hf.qtypes import QType


def native_fit(fit: Fit, grid: Grid) -> NativeFit | None:
    """The fit as the native quantizer knows it, or None: it does not know it, or the fit refuses the grid.

    A class that inherits from a fit is not known: it may compute something else.
    """
    numbers: tuple[float, ...]
    if type(fit) is Minmax or (type(fit) is Absmax and not grid.has_zero):
        kind, numbers = "range", ()
    elif type(fit) in (mse.Mse, mse.MseGain):
        back = mse.GAIN_BACK if type(fit) is mse.MseGain else 0.0
        kind, numbers = "mse", (back, mse.ROUNDS, *mse.START_RATIOS[grid.qtype.bits])
    elif type(fit) is Hqq and grid.has_zero and 0 <= fit.p <= 1 and fit.beta > 0 and fit.kappa > 0:
        kind, numbers = "hqq", (fit.p, fit.beta, fit.kappa, fit.iterations)
    else:
        return None
    table = native_table(grid.qtype) if grid.qtype.kind == "table" else None
    return NativeFit(kind, (grid.lowest, grid.highest, *numbers), table)


@lru_cache(maxsize=16)
def native_table(qtype: QType) -> torch.Tensor:
    """The lookup tables of a grid in 49 float32: where the next number begins, the numbers, their codes, and the cells
    per unit.

    Numbers are sorted; beyond the last border there is none, which is infinity.
    """
    with torch.inference_mode(False):
        numbers, codes = lookup_tables(qtype, torch.device("cpu"))
        borders = (codes[1:] != codes[:-1]).nonzero().flatten() + 1
        first = torch.cat([borders.new_zeros(1), borders])
        table = torch.zeros(3, 16)
        table[0] = torch.inf
        table[0, : borders.numel()] = borders.float()
        table[1, : first.numel()] = numbers[first]
        table[2, : first.numel()] = codes[first].float()
        # the double that torch multiplies with, rounded as torch rounds it
        return torch.cat([table.flatten(), torch.tensor([(CELLS - 1) / (qtype.qmax - qtype.qmin)])])
