"""Modules that are observed, and quantized, by classes of their own."""

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["get_default_custom_config_dict", "no_observer_set"]

TO_OBSERVED = "float_to_observed_custom_module_class"
TO_QUANTIZED = "observed_to_quantized_custom_module_class"


_TO_OBSERVED: dict[type[nn.Module], type[nn.Module]] = {}
_TO_QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {}


def register(float_class: type[nn.Module], observed: type[nn.Module], quantized: type[nn.Module]) -> None:
    """Make ``prepare`` and ``convert`` treat a module type in a way of its own, unless they are told another.

    Args:
        float_class: the type of a module in a float model.
        observed: what ``prepare`` puts in its place, by its class method ``from_float``. It has observers inside, and
            gets none for its output.
        quantized: what ``convert`` puts in the place of ``observed``, by its class method ``from_observed``.
    """
    _TO_OBSERVED[float_class], _TO_QUANTIZED[observed] = observed, quantized


def get_default_custom_config_dict() -> dict[str, dict[type[nn.Module], type[nn.Module]]]:
    """The modules that ``prepare`` and ``convert`` treat in a way of their own: LSTM and MultiheadAttention."""
    return {TO_OBSERVED: dict(_TO_OBSERVED), TO_QUANTIZED: dict(_TO_QUANTIZED)}


def no_observer_set() -> set[type[nn.Module]]:
    """Observed classes that have observers inside, and get none for their output."""
    return set(_TO_QUANTIZED)


def classes(config: Mapping[str, Any] | None, part: str, method: str) -> dict[type[nn.Module], Any]:
    """One of the two mappings.

    Raises:
        TypeError: a class in it has not the method that makes the new module.
    """
    mapping = dict((get_default_custom_config_dict() if config is None else config).get(part, {}))
    for made in mapping.values():
        if not callable(getattr(made, method, None)):
            raise TypeError(f"{made!r} in {part} has no class method {method}")
    return mapping
