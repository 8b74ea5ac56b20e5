"""How the fits of this room are named to the native quantizer, which computes the same (quanto_hf/ops/cpu)."""

from functools import lru_cache

import torch

from quanto_hf.fit import mse
from quanto_hf.fit.base import Fit
from quanto_hf.fit.grid import CELLS, Grid, lookup_tables
from quanto_hf.fit.hqq import Hqq
from quanto_hf.fit.ranges import Absmax, Minmax
from quanto_hf.ops.quantize import NativeFit
from quanto_hf.qtypes import QType

# csrc/grid.h looks up 16 floats.
STRETCHES = 16


def native_fit(fit: Fit, grid: Grid) -> NativeFit | None:
    """The fit as the native quantizer knows it, or None: it does not know it, or the fit refuses the grid.

    A class that inherits from a fit is not known: it may compute something else.
    """
    numbers: tuple[float, ...]
    if type(fit) is Minmax or (type(fit) is Absmax and not grid.has_zero):
        kind, numbers = "range", ()
    elif type(fit) in (mse.Mse, mse.MseGain):
        back = mse.GAIN_BACK if type(fit) is mse.MseGain else 0.0
        kind, numbers = "mse", (back, mse.ROUNDS, *grid.qtype.start_ratios)
    elif type(fit) is Hqq and grid.has_zero and 0 <= fit.p <= 1 and fit.beta > 0 and fit.kappa > 0:
        kind, numbers = "hqq", (fit.p, fit.beta, fit.kappa, fit.iterations)
    else:
        return None
    table = native_table(grid.qtype) if grid.qtype.kind == "table" else None
    return NativeFit(kind, (grid.lowest, grid.highest, *numbers), table)


@lru_cache(maxsize=16)
def native_table(qtype: QType) -> torch.Tensor:
    """The lookup tables of a grid in 129 float32, as csrc/grid.h describes them.

    A stretch of 4096 cells has up to three different nearest numbers. For each of 16 stretches: where the second and
    the third begin (infinity: nowhere), the three numbers, and their codes; then the cells per unit.
    """
    with torch.inference_mode(False):
        numbers, codes = lookup_tables(qtype, torch.device("cpu"))
        table = torch.zeros(8, STRETCHES, dtype=torch.float32, device="cpu")
        table[:2] = torch.inf
        for i, stretch in enumerate(torch.arange(CELLS, dtype=torch.int64, device="cpu").view(STRETCHES, -1)):
            here = codes[stretch]
            new = (stretch[1:][here[1:] != here[:-1]]).tolist()
            assert len(new) <= 2
            table[: len(new), i] = torch.tensor(new, dtype=torch.float32, device="cpu")
            first = [int(stretch[0]), *new]
            table[2 : 2 + len(first), i] = numbers[first]
            table[5 : 5 + len(first), i] = codes[first].float()
        # the double that torch multiplies with, rounded as torch rounds it
        unit = torch.tensor([(CELLS - 1) / (qtype.qmax - qtype.qmin)], dtype=torch.float32, device="cpu")
        return torch.cat([table.flatten(), unit])
