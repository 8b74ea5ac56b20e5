"""``resize_token_embeddings`` of models whose embeddings or heads are packed: float meanwhile, and packed again.

Rows that were there keep their stored tensors where a scheme works by rows, so that a model may be resized many times.
"""

import functools
import warnings
from typing import Any

import torch
import transformers
from torch import nn

from quanto_hf.flow import quantized, replace_modules
from quanto_hf.flow.ties import hold_same
from quanto_hf.nn import QuantizedInput, QuantizedWeight
from quanto_hf.nn.activation import INPUT_SCALE
from quanto_hf.nn.qembedding import QuantizedTable
from quanto_hf.nn.slots import Slot

METHOD = "resize_token_embeddings"


def watch_resizing() -> None:
    """Let every model class of transformers that exists now resize packed embeddings. In the classes, as of saving
    (:func:`quanto_hf.hf.save.saving.watch_saving`); models without packed ones are resized as before."""
    todo: list[Any] = [transformers.PreTrainedModel]
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        resize = vars(cls).get(METHOD)
        if callable(resize) and not getattr(resize, "knows_quanto_hf", False):
            setattr(cls, METHOD, _watched(resize))


def _watched(resize: Any) -> Any:
    @functools.wraps(resize)
    def resize_token_embeddings(model: Any, *args: Any, **kwargs: Any) -> Any:
        asked = (*args[:2], kwargs.get("new_num_tokens"), kwargs.get("pad_to_multiple_of"))
        nothing = all(value is None for value in asked)
        packed = {} if nothing else vocabulary_layers(model)
        if not packed:
            return resize(model, *args, **kwargs)
        _refuse_offloaded(packed)
        names = ", ".join(f"{name} ({layer.scheme})" for name, layer in packed.items())
        warnings.warn(
            f"{METHOD} makes {names} float, and quantizes them again: rows that were there keep their numbers, new "
            "ones are rounded",
            stacklevel=2,
        )
        known: dict[tuple[int, ...], nn.Parameter] = {}
        replace_modules(model, {layer: layer.to_float(known) for layer in packed.values()})
        made: dict[nn.Module, nn.Module] = {}
        try:
            found = resize(model, *args, **kwargs)
        finally:
            made.update(_pack_again(model, packed))
        return made.get(found, found)

    resize_token_embeddings.knows_quanto_hf = True  # type: ignore[attr-defined]
    return resize_token_embeddings


def vocabulary_layers(model: Any) -> dict[str, QuantizedWeight]:
    """Name -> module, of all packed ones that have one row for each token: the input embedding, tables of its size such
    as those per layer, the output head, and what shares a weight with one of them."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = getattr(table, "num_embeddings", None)
    heads = set(head.modules()) if isinstance(head, nn.Module) else set()
    packed = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedWeight) and m.is_frozen}
    found = {
        name
        for name, module in packed.items()
        if module is table or module in heads or (isinstance(module, QuantizedTable) and module.num_embeddings == rows)
    }
    held = {id(packed[name]._parameters[leaf]) for name in found for leaf in packed[name].stored_names}
    shares = {n for n, m in packed.items() if any(id(m._parameters[leaf]) in held for leaf in m.stored_names)}
    return {name: module for name, module in packed.items() if name in found | shares}


def _refuse_offloaded(packed: dict[str, QuantizedWeight]) -> None:
    """Raise ValueError for weights that are not in memory, or are pages of files of a device map."""
    for name, layer in packed.items():
        if any(layer._parameters[leaf].is_meta for leaf in layer.stored_names):  # type: ignore[union-attr]
            raise ValueError(f"{name} is offloaded and cannot be resized; load the model without disk offload first")


def _pack_again(model: Any, packed: dict[str, QuantizedWeight]) -> dict[nn.Module, nn.Module]:
    """Put quantized modules in the place of the float ones. Returns float module -> quantized one."""
    made: dict[nn.Module, nn.Module] = {}
    first: dict[int, tuple[QuantizedWeight, Slot]] = {}
    for name, old in packed.items():
        module = model.get_submodule(name)
        activations = old.activations if isinstance(old, QuantizedInput) else None
        new = quantized(module, old.scheme, activations, old.fit)
        slot, weight = new.slot(), module._parameters[new.slot().name]
        if id(weight) in first:
            hold_same(new, slot, *first[id(weight)])
        else:
            new.freeze(_stored(new, slot, old, weight.detach()))
            first[id(weight)] = new, slot
        if (scale := old.held(INPUT_SCALE)) is not None:
            new.register_buffer(INPUT_SCALE, scale)
        new._is_hf_initialized = True  # type: ignore[assignment]
        made[module] = new
    replace_modules(model, made)
    return made


def _stored(new: QuantizedWeight, slot: Slot, old: QuantizedWeight, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The stored tensors of a resized weight, those of rows that were there as they were."""
    before, held = old.slot(), old.tensors()
    rows = min(before.matrix_shape[0], slot.matrix_shape[0])
    if not old.scheme.by_rows or before.matrix_shape[1:] != slot.matrix_shape[1:] or not rows:
        return new.quantized()
    kept = {part: tensor.data[:rows] for part, tensor in held.items()}
    if rows == slot.matrix_shape[0]:
        return {part: tensor.clone() for part, tensor in kept.items()}
    added = old.scheme.quantize(slot.to_matrix(weight)[rows:].contiguous(), old.fit)
    return {part: torch.cat([tensor, added[part]]) for part, tensor in kept.items()}
