"""Packed weights of experts under the names of the published float checkpoints: a name for each expert.

A model holds the experts of a layer as one parameter; most published files have a tensor for each expert, and for gate
and up projection, as vLLM reads them. transformers merges float tensors on loading and splits them on saving, by the
converters of the model. Rows of a packed weight stand for outputs, and experts are stacked before rows, so that the
same operations merge and split each of its stored tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, PrefixChange, WeightConverter

from quanto_hf.nn import QuantizedWeight
from quanto_hf.nn.slots import WEIGHT

# What the names of float weights in the files end in.
END = f".{WEIGHT}"


def packed_conversions(conversions: list[Any], model: nn.Module) -> list[WeightConverter]:
    """For each converter that merges float weights of experts, one for each of the stored tensors of the slots.

    Args:
        conversions: of the model.
        model: quantized layers in place.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    slots = [(slot, module.scheme_of(slot)) for module in layers for slot in module.slots]
    # a transposed stack has inputs where the files have rows
    parts = {
        slot.name: {slot.stored(part).removeprefix(slot.name) for part in scheme.names}
        for slot, scheme in slots
        if slot.leading and not slot.transposed and scheme.by_rows
    }
    found = []
    for converter in conversions:
        if not _merges_experts(converter):
            continue
        sources, (target,) = converter._original_source_patterns, converter._original_target_patterns
        for suffix in sorted(parts.get(target.rpartition(".")[2], ())):
            names = [source + suffix for source in sources]
            found.append(converter.copy(names, [target + suffix], operations=list(converter.operations)))
    return found


def _merges_experts(converter: Any) -> bool:
    """Whether the loader stacks the float weights of experts by it."""
    if not isinstance(converter, WeightConverter):
        return False
    first, *others = converter.operations
    return (
        len(converter.target_patterns) == 1
        and all(source.endswith(END) for source in converter._original_source_patterns)
        and (type(first), getattr(first, "dim", None)) == (MergeModulelist, 0)
        and all((type(other), getattr(other, "dim", None)) == (Concatenate, 1) for other in others)
    )


@contextmanager
def split_on_saving(model: Any) -> Iterator[None]:
    """While it lasts, ``save_pretrained`` gives each expert tensors of its own, if the config of the model says so.

    Args:
        model: any model.

    Raises:
        ValueError: the config says so, and there is no such name for experts of the model.
    """
    config: Any = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if not hasattr(config, "split_experts") or not (stacks := {slot.name for slot in _stacks(model)}):
        yield
        return
    every = get_model_conversion_mapping(model, add_legacy=False)
    before = getattr(model, "_weight_conversions", None)
    # of a model that was not loaded transformers does not know either whether a prefix is to be added
    known = [entry for entry in every if not isinstance(entry, PrefixChange)] if before is None else before
    # those that it was loaded with are not there for ever
    conversions = [entry for entry in known if not _is_packed(entry)]
    if config.split_experts:
        packed = packed_conversions(every, model)
        named = {entry._original_target_patterns[0].rpartition(".")[2] for entry in every if _merges_experts(entry)}
        if unnamed := sorted(stacks - named):
            raise ValueError(
                f"split_experts=True: in the files of {type(model).__name__} one tensor holds {' or '.join(unnamed)} "
                "of all experts; set model.config.quantization_config.split_experts = False"
            )
        conversions += packed
    model._weight_conversions = conversions
    try:
        yield
    finally:
        if before is None:
            del model._weight_conversions
        else:
            model._weight_conversions = before


def _is_packed(entry: Any) -> bool:
    """Whether a conversion is one of :func:`packed_conversions`."""
    return isinstance(entry, WeightConverter) and all(f"{END}_" in source for source in entry._original_source_patterns)


def _stacks(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, QuantizedWeight) and module.is_frozen:
            yield from (slot for slot in module.slots if slot.leading)
