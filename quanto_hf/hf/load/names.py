"""Names of tensors: in the files, as the loader gives them, and which slot of a model each belongs to."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from quanto_hf.nn import QuantizedWeight
from quanto_hf.nn.slots import Slot, joined, module_at


def split_name(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns a parameter, and the parameter's own name."""
    path, _, leaf = name.rpartition(".")
    return module_at(model, path), leaf


def slot_at(model: nn.Module, name: str) -> tuple[QuantizedWeight, Slot] | None:
    """The quantized module and the slot whose float parameter has this name, if it holds the slot packed or will. A
    module for training does not."""
    try:
        module, leaf = split_name(model, name)
    except AttributeError:
        return None
    if not isinstance(module, QuantizedWeight):
        return None
    # beside the placeholder a layer holds the empty tensors for what is made of it
    if leaf not in (module.slot_schemes or module.slot_names) or not module.holds(slot := module.slot(leaf)):
        return None
    return module, slot


def stored_name(slot: Slot, name: str, part: str) -> str:
    """Name in the model of a stored tensor of a slot whose float parameter has this name."""
    return joined(name.rpartition(".")[0], slot.stored(part))


def waiting_slot(model: nn.Module, name: str) -> tuple[QuantizedWeight, Slot] | None:
    """:func:`slot_at` for a float parameter that is to be packed on arrival."""
    found = slot_at(model, name)
    return found if found is not None and found[0]._parameters.get(found[1].name) is not None else None


def loader_names(
    model: Any, keys: Iterable[str], conversions: Iterable[Any], state: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, str, WeightConverter | None, str]]:
    """What the loader makes of the names in a checkpoint, in its order.

    Args:
        model: the model on meta.
        keys: names in the files.
        conversions: what the loader does with these names.
        state: the state dict of ``model``.

    Yields:
        The name in the file, the (first) name in the model, and the converter that merges or splits the tensor, with
        the pattern by which it knows it, or None and an empty string. The model need not have the name.
    """
    conversions, prefix = list(conversions), model.base_model_prefix
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        made = next((c for c in converters if pattern is not None and pattern in c.source_patterns), None)
        yield key, name, made, pattern if made is not None else ""


def targets_of(converter: WeightConverter, first: str) -> list[str]:
    """The names in the model of all that a converter makes together with ``first``."""
    return [first.replace(converter.target_patterns[0], target, 1) for target in converter.target_patterns]
