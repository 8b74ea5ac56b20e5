"""The quantized state of a plain model moved to another one, in optimum-quanto's words."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from quanto_hf.flow.applying import by_module, quantized, replace_modules
from quanto_hf.flow.refuse import refuse_other_dtypes
from quanto_hf.flow.ties import Ties, share_packed
from quanto_hf.flow.verbs import activation_type
from quanto_hf.nn import QuantizedInput, QuantizedWeight, qmodule_for
from quanto_hf.nn.slots import joined, label
from quanto_hf.schemes import scheme_from_dict


def quantization_map(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Name of a slot -> ``{"scheme": ..., "activations": ..., "static": ...}`` in JSON types, for :func:`requantize`. A
    ``weight`` has the name of its module."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            kind = module.activations if isinstance(module, QuantizedInput) else None
            static = isinstance(module, QuantizedInput) and module.is_static
            for slot in module.slots:
                found[slot.label(name)] = {
                    "scheme": module.scheme_of(slot).to_dict(),
                    "activations": None if kind is None else kind.name,
                    "static": static,
                }
    return found


def requantize(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], quantization_map: Mapping[str, Mapping[str, Any]]
) -> nn.Module:
    """Give a float model of the same architecture the quantized state of another one, in place.

    Args:
        model: may be on meta, where nothing is allocated twice.
        state_dict: of the frozen model.
        quantization_map: of the frozen model.

    Returns:
        The model itself.

    Raises:
        ValueError: the map names a module that the model has not, or that is of another type.
        RuntimeError: the state dict has missing, unexpected or mismatched tensors; the text names each of them.
    """
    modules, owners = dict(model.named_modules()), by_module(model, quantization_map)
    unfit = [
        label(name, leaf)
        for name, entries in owners.items()
        for leaf in entries
        if name not in modules or (cls := qmodule_for(modules[name])) is None or leaf not in cls.slot_names
    ]
    if unfit:
        raise ValueError(
            f"the quantization map names what this model has not, or what is not quantized: {', '.join(unfit)}"
        )
    refuse_other_dtypes(model, quantization_map)
    tied = Ties(model)
    made: dict[nn.Module, nn.Module] = {}
    for name, entries in owners.items():
        schemes = {leaf: scheme_from_dict(dict(entry["scheme"])) for leaf, entry in entries.items()}
        entry = next(iter(entries.values()))
        kind = activation_type(entry.get("activations"))
        layer = quantized(modules[name], schemes, kind, static=bool(entry.get("static", False)))
        layer.make_empty()
        made[modules[name]] = layer
    replace_modules(model, made)
    shared = tied.packed(model)
    state = dict(state_dict)
    for (name, first, slot), *others in shared:
        for other, _, its in others:
            # files have them once
            for ours, theirs in zip(slot.names(first.scheme_of(slot)), its.names(first.scheme_of(slot)), strict=True):
                if joined(name, ours) in state:
                    state.setdefault(joined(other, theirs), state[joined(name, ours)])
    # a tensor that is assigned takes over requires_grad from the parameter in its place
    model.load_state_dict(state, strict=True, assign=True)
    share_packed(shared)
    return model
