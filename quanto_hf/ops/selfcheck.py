"""What is fast shows once, before its first use, that it agrees with its definition on this machine.

A kind of call (number type, grouping, dtype of x, few or many rows) is checked on a small random weight with awkward
sizes. A kernel that disagrees is reported loudly and never used again in this process: wrong fast kernels are what
people remember of other quantizers.
"""

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, Protocol

import torch

# Kernels differ for few rows of x and for more (csrc/common.h).
FEW_ROWS = 8
# Numbers of rows that a product is checked with: one row has kernels of its own, and so may three and five have; the
# last tile of many rows is multiplied another way.
FEW, MANY = (1, 3, 5), (FEW_ROWS + 1, 2 * FEW_ROWS + 3)
# Largest |difference| / largest |weight|, in float32.
WEIGHT_TOLERANCE = 1e-6
# Largest |difference| / (|x| @ |weight|): rounding of the weight and of the result in the dtype of x. All kernels of
# all levels stay below 60 % of these.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 2e-3}


class WhyWrong(Protocol):
    """Asks once for each key whether something is wrong on this machine, and keeps the answer."""

    def __call__(self, *key: Hashable) -> str | None: ...
    def cache_clear(self) -> None: ...
    def cache_info(self) -> Any: ...


@contextmanager
def neutral_settings() -> Iterator[None]:
    """The first call may stand under autocast, or another default device. Another default dtype, which belongs to the
    whole process, cannot be put aside here: whatever is made for a check names its dtype."""
    with torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.no_grad():
        yield


def checked(what: Callable[..., str]) -> Callable[[Callable[..., list[tuple[float, float]]]], Any]:
    """Decorator of a function that measures errors: it becomes one that says whether something is wrong.

    Args:
        what: ``what(*key)`` names what was measured, for the warning.

    Returns:
        A decorator of ``errors(*key)``, which returns pairs of an error and the largest one that is allowed. Decorated
        it returns None if all errors are allowed, else the sentence that says how the first one fails, which is also
        warned about. The answer for a key is kept; ``cache_clear()`` forgets.
    """

    def decorate(errors: Callable[..., list[tuple[float, float]]]) -> Any:
        @cache
        @neutral_settings()
        @wraps(errors)
        def why_wrong(*key: Hashable) -> str | None:
            for error, allowed in errors(*key):
                if not error <= allowed:
                    return report(what(*key), error)
            return None

        return why_wrong

    return decorate


def report(what: str, error: float) -> str:
    """Warn that a kernel is wrong, and give the sentence."""
    sentence = (
        f"the {what} disagrees with the reference (error {error:.2g}) on this machine; slower kernels are used "
        "instead. Please report this with the output of `quanto-hf kernels`."
    )
    warnings.warn(sentence, RuntimeWarning, stacklevel=4)
    return sentence


def largest(values: torch.Tensor) -> float:
    """The largest value, infinity where there is a NaN."""
    return float(values.nan_to_num(nan=torch.inf).max())


def off(made: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, exact: torch.Tensor, more: float = 0.0) -> float:
    """How far a product is off, over |x| @ |weight|.

    Args:
        made: the product with x, shape (rows, out_features).
        x: shape (rows, in_features).
        weight: float32, shape (out_features, in_features).
        exact: the product in float32.
        more: size of the bias.
    """
    size = x.float().abs() @ weight.abs().T + more
    return largest((made.float() - exact).abs() / size)
