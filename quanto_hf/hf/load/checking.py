"""The check of a checkpoint before it is loaded: its headers against the empty quantized model."""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from quanto_hf.flow import replace_modules
from quanto_hf.flow.ties import Ties
from quanto_hf.hf.load.merging import stacks_experts
from quanto_hf.hf.load.names import loader_names, split_name, targets_of
from quanto_hf.hf.load.stored_dtypes import disagreements
from quanto_hf.io import check_tensors, find_guards, without_guards
from quanto_hf.nn import QuantizedWeight
from quanto_hf.nn.slots import joined
from quanto_hf.schemes import TensorSpec


def check_before_loading(
    model: Any, headers: Mapping[str, TensorSpec], conversions: Iterable[Any], pre_quantized: bool, complete: bool
) -> None:
    """Compare the headers of a checkpoint with an empty quantized model.

    Args:
        model: the model on meta, quantized layers in place.
        headers: of the checkpoint files, by the names in the files.
        conversions: what the loader will do with these names.
        pre_quantized: whether the checkpoint is quantized.
        complete: whether the checkpoint was written from the same model class, so that nothing may be missing. Else
            only quantized layers are compared, and one that the checkpoint does not have at all becomes a plain
            layer, which transformers initialises.

    Raises:
        CheckpointError: lists every missing, unexpected and mismatched tensor by name.
    """
    state = model.state_dict()
    if pre_quantized:
        headers = without_guards(headers)
    targets, unexpected, converted = _rename(model, headers, conversions, state)
    incomplete = [
        line for name, parts in converted.items() if name in state for line in _lacks(name, state[name], parts)
    ]
    tied = set(model.all_tied_weights_keys)
    groups = Ties(model, model.all_tied_weights_keys)

    def has(name: str) -> bool:
        """Whether the checkpoint has it under this name or that of what it is tied to."""
        return any(other in targets for other in groups.group(name))

    wanted: dict[str, TensorSpec] = {}
    absent: dict[str, QuantizedWeight] = {}
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedWeight):
            continue
        names = _checkpoint_names(module, name, pre_quantized)
        if not complete and not any(has(n) for n in names):
            absent[name] = module
        else:
            wanted.update({n: _spec(state[n]) for n in names if n in targets or not has(n)})
    if absent:
        _leave_in_float(model, absent)
    if pre_quantized and complete:
        ignored = _ignored(model._keys_to_ignore_on_load_missing)
        buffers = {name for name, _ in model.named_buffers()}
        wanted.update(
            {
                name: _spec(tensor)
                for name, tensor in state.items()
                if name not in tied and name not in buffers and not ignored(name)
            }
        )
    # what a converter merges or splits has other shapes in the file
    found = {name: spec for name, spec in targets.items() if name not in converted}
    wanted = {name: spec for name, spec in wanted.items() if name not in converted}
    if not pre_quantized:
        # a float checkpoint may have any dtype, and transformers reports what it does not use
        found = {name: TensorSpec(spec.shape, torch.float32) for name, spec in found.items()}
        unexpected = []
    elif not complete:
        unexpected = [name for name in unexpected if _belongs_to(model, name)]
    exact, more = (_exact(model), disagreements(model, found)) if pre_quantized else ((), [])
    check_tensors(wanted, found, unexpected, exact, [*more, *incomplete])


def _exact(model: nn.Module) -> set[str]:
    """Names of what the loader must not convert to another dtype."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedWeight))
    return {joined(name, leaf) for name, module in layers for leaf in module.kept_names}


def _checkpoint_names(module: QuantizedWeight, name: str, pre_quantized: bool) -> list[str]:
    # what is in no file: the model makes it
    made = {*(() if pre_quantized else module.kept_names), *module._non_persistent_buffers_set}
    held = {**module._parameters, **module._buffers}
    leaves = [leaf for leaf, tensor in held.items() if tensor is not None and leaf not in made]
    return [joined(name, leaf) for leaf in leaves]


def _rename(
    model: Any, headers: Mapping[str, TensorSpec], conversions: Iterable[Any], state: Mapping[str, torch.Tensor]
) -> tuple[dict[str, TensorSpec], list[str], dict[str, Counter[str]]]:
    """Specs by model name, names in the file without a place in the model, and model names made by converters, with how
    many tensors of each pattern they are made of: of none where a model is to have a tensor for each expert."""
    ignored = _ignored(model._keys_to_ignore_on_load_unexpected)
    targets: dict[str, TensorSpec] = {}
    unexpected: list[str] = []
    converted: dict[str, Counter[str]] = {}
    for key, name, converter, pattern in loader_names(model, headers, conversions, state):
        if converter is not None:
            names = targets_of(converter, name)
            targets.update(dict.fromkeys(names, headers[key]))
            stacks = len(names) == 1 and stacks_experts(converter)
            for made in names:
                parts = converted.setdefault(made, Counter())
                if stacks:
                    parts.update({**dict.fromkeys(converter.source_patterns, 0), pattern: 1})
        elif name in state:
            targets[name] = headers[key]
        elif not ignored(name) and not name.endswith(("rotary_emb.inv_freq", "position_ids")):
            unexpected.append(key)
    return targets, unexpected, converted


def _lacks(name: str, tensor: torch.Tensor, parts: Mapping[str, int]) -> list[str]:
    """A line for each pattern that a stack of experts has too few, or too many, tensors of."""
    count = tensor.shape[0] if tensor.dim() else 0
    return [
        f"wrong number: {name} is made of {count} tensors {pattern}, and the checkpoint has {found}"
        for pattern, found in parts.items()
        if found != count
    ]


def expect_guards(model: Any, headers: Mapping[str, TensorSpec], conversions: Iterable[Any]) -> None:
    """Have the loader say nothing about the guards in a checkpoint, for which a packed layer has no place. One that the
    model has a float weight for stays an error.

    Args:
        model: the model on meta, quantized layers in place.
        headers: of the checkpoint files, by the names in the files.
        conversions: what the loader will do with these names.
    """
    expected: set[str] = set()
    for _, name, converter, _ in loader_names(model, find_guards(headers), conversions, model.state_dict()):
        names = [name] if converter is None else targets_of(converter, name)
        expected.update(f"^{re.escape(name)}$" for name in names)
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *expected}


def _ignored(patterns: Iterable[str] | None) -> Any:
    if not patterns:
        return lambda name: False
    compiled = re.compile("|".join(f"({pattern})" for pattern in patterns))
    return lambda name: compiled.search(name) is not None


def _spec(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tensor.dtype)


def _belongs_to(model: nn.Module, name: str) -> bool:
    """Whether an unexpected name is that of a quantized layer of the model."""
    try:
        return isinstance(split_name(model, name)[0], QuantizedWeight)
    except AttributeError:
        return False


def _leave_in_float(model: nn.Module, absent: Mapping[str, QuantizedWeight]) -> None:
    """Put plain layers on meta in the places of quantized ones that the checkpoint does not have."""
    names = list(absent)
    if len(names) == 1:
        said = f"{names[0]} is not in the checkpoint: it is newly initialised and stays float. Add it"
    else:
        said = (
            f"{names[0]} and {len(names) - 1} other layers are not in the checkpoint: they are newly initialised and "
            "stay float. Add them"
        )
    warnings.warn(f"{said} to modules_to_not_convert to say so yourself", stacklevel=2)
    made: dict[nn.Module, nn.Module] = {}
    for module in absent.values():
        made[module] = module.empty_float("it is not in the checkpoint")
    replace_modules(model, made)
