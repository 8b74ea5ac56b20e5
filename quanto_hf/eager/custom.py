"""Modules that are observed, and quantized, by classes of their own."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from quanto_hf.eager.attention import ObservedMultiheadAttention, QuantizedMultiheadAttention
from quanto_hf.eager.lstm import ObservedLSTM, QuantizedLSTM

TO_OBSERVED = "float_to_observed_custom_module_class"
TO_QUANTIZED = "observed_to_quantized_custom_module_class"


def get_default_custom_config_dict() -> dict[str, dict[type[nn.Module], type[nn.Module]]]:
    """The modules that ``prepare`` and ``convert`` treat in a way of their own: LSTM and MultiheadAttention."""
    return {
        TO_OBSERVED: {nn.LSTM: ObservedLSTM, nn.MultiheadAttention: ObservedMultiheadAttention},
        TO_QUANTIZED: {ObservedLSTM: QuantizedLSTM, ObservedMultiheadAttention: QuantizedMultiheadAttention},
    }


def no_observer_set() -> set[type[nn.Module]]:
    """Observed classes that have observers inside, and get none for their output."""
    return {ObservedLSTM, ObservedMultiheadAttention}


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
