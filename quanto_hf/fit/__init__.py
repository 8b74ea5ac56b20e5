"""Weight to scale and zero: each fit is one class, found by its name.

Imports: ``qtypes`` and torch. Never: a scheme (a fit does not know how codes are stored).
"""

from quanto_hf.fit.base import FITS, NO_CONTEXT, AnyFit, Context, Fit, Rounded, fit_by_name, name_of_fit, register
from quanto_hf.fit.grid import Grid
from quanto_hf.fit.hqq import Hqq
from quanto_hf.fit.mse import Mse, MseGain
from quanto_hf.fit.native import native_fit
from quanto_hf.fit.ranges import Absmax, Minmax
from quanto_hf.fit.scales import BFLOAT16, FLOAT32, ScaleType

# the names that optimum-quanto's users know
AbsmaxOptimizer = Absmax
MaxOptimizer = Minmax
HqqOptimizer = Hqq

__all__ = [
    "BFLOAT16",
    "FITS",
    "FLOAT32",
    "NO_CONTEXT",
    "Absmax",
    "AbsmaxOptimizer",
    "AnyFit",
    "Context",
    "Fit",
    "Grid",
    "Hqq",
    "HqqOptimizer",
    "MaxOptimizer",
    "Minmax",
    "Mse",
    "MseGain",
    "Rounded",
    "ScaleType",
    "fit_by_name",
    "name_of_fit",
    "native_fit",
    "register",
]
