"""Bad values among those that say how a weight is stored."""

from collections.abc import Mapping
from typing import Any

from quanto_hf.fit import FITS
from quanto_hf.hf.config.foreign_words import SHORT
from quanto_hf.schemes import SCHEMES, Affine, class_of, names_of_schemes


def value_problems(values: Mapping[str, Any], weights: Any, may_be_float: bool = False) -> list[str]:
    """One sentence for each bad value among weights, group_size, symmetric and fit.

    Args:
        weights: what the values are for, named by them or not.
    """
    problems = []
    if "weights" in values and class_of(values["weights"]) is None and not (may_be_float and values["weights"] is None):
        none = ", or None for float" if may_be_float else ""
        spellings = " or ".join(cls.spelling for cls in SCHEMES.values() if cls.spelling)
        names = f"{', '.join(names_of_schemes())} (any {spellings})"
        problems.append(f"weights={SHORT.repr(values['weights'])}; choose one of {names}{none}")
    if (group_size := values.get("group_size")) is not None:
        reason = (class_of(weights) or Affine).refuses_group_size(weights, group_size)
        problems += [] if reason is None else [reason]
    if values.get("symmetric") not in (None, True, False):
        problems.append(f"symmetric={SHORT.repr(values['symmetric'])}; choose None, True or False")
    # a list of the names: what is not hashable is no name either
    if values.get("fit") is not None and values["fit"] not in list(FITS):
        problems.append(f"fit={SHORT.repr(values['fit'])}; choose one of {', '.join(sorted(FITS))}")
    return problems
