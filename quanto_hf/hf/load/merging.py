"""A weight that the loader merges from several tensors is quantized before it is merged, piece by piece.

Merged first, it would be in memory twice as floats: the model's own converter makes a copy of all of its pieces.
"""

import copy
from typing import Any

import torch
from transformers.core_model_loading import Concatenate, WeightConverter

from quanto_hf.hf.load.names import slot_at


class ConcatenateLater(Concatenate):  # type: ignore[misc]
    """Tensors that are put together along their first dimension, except those of a slot that is to be packed, which
    stay a list: its rows are quantized each on its own, so that the pieces can be quantized first."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The merged tensor, or the list of its pieces in their order."""
        model, name = kwargs.get("model"), kwargs.get("full_layer_name", "")
        if model is None or slot_at(model, name) is None:
            merged: dict[str, torch.Tensor] = super().convert(input_dict, source_patterns, target_patterns, **kwargs)
            return merged
        pieces: list[torch.Tensor] = []
        for pattern in source_patterns:
            found = input_dict.pop(pattern, [])
            pieces += found if isinstance(found, list) else [found]
        return {self.get_target_pattern(target_patterns): pieces}


def merge_late(conversions: list[Any]) -> list[Any]:
    """The loader's conversions, with :class:`ConcatenateLater` where a converter ends in putting rows together."""
    return [_late(entry) if isinstance(entry, WeightConverter) else entry for entry in conversions]


def _late(converter: Any) -> Any:
    last = converter.operations[-1] if converter.operations else None
    if last is None or type(last) is not Concatenate or last.dim != 0:
        return converter
    late = copy.deepcopy(converter)
    late.operations = [*late.operations[:-1], ConcatenateLater(last.dim, last.num_shards_attribute)]
    return late
