"""Modules of a transformers model that stay float by default, each with its reason."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from quanto_hf.flow import matches
from quanto_hf.flow.routers import routers
from quanto_hf.nn import QuantizedWeight
from quanto_hf.nn.registry import entry_of
from quanto_hf.nn.slots import WEIGHT

# Layers with a weight of a part outside of the base model, up to which the part is a head, and not a network. Of the
# families of transformers no head has more (Splinter), and no network fewer than 25 (the decoder of VideoMAE).
HEAD_LAYERS = 6
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def default_skips(model: Any, dtype: torch.dtype, heads: bool = True, asked: Iterable[str] = ()) -> dict[str, str]:
    """Module name -> why it stays float.

    Args:
        model: a PreTrainedModel, usually on meta.
        dtype: the dtype in which it is loaded.
        heads: also the output head, task heads (:func:`task_heads`), and routers and gates
            (:func:`quanto_hf.flow.routers.routers`).
        asked: patterns that ask for routers and gates all the same.
    """
    skips: dict[str, str] = {}
    for target, source in model.all_tied_weights_keys.items():
        for tied, other in ((target, source), (source, target)):
            skips[tied.removesuffix(f".{WEIGHT}")] = f"its weight is tied to {other}"
    for pattern in model._get_dtype_plan(dtype):
        for name, _ in model.named_modules():
            if matches(name, pattern):
                skips.setdefault(name, "the model keeps it in float32")
    if not heads:
        return skips
    output, ends = model.get_output_embeddings(), task_heads(model)
    for name, module in model.named_modules():
        if module is output:
            skips.setdefault(name, "the output head stays float by default")
        elif module in ends:
            skips.setdefault(name, "task heads stay float by default")
    return {**routers(model, getattr(model, "config", None), asked), **skips}


def task_heads(model: Any) -> set[nn.Module]:
    """The modules of the heads of a model: the last layers, which give its outputs. They are small, their errors are
    those of the outputs, and a head that is not in the checkpoint is newly initialised.

    A head is a part outside of the base model with a few layers (``HEAD_LAYERS``: an MLP, a dense layer and a
    projection); lists hold one part each. A part with more layers is a network, such as the decoder of ViT-MAE: only
    its last layer is a head. Layers in repeated blocks are not the last ones.

    Args:
        model: a PreTrainedModel.
    """
    base = model.base_model
    if base is model:
        return set()
    heads: set[nn.Module] = set()
    for part in _parts(model, base):
        layers = [(name, layer) for name, layer in part.named_modules() if isinstance(layer, LAYERS)]
        last = [layer for name, layer in layers if not _in_a_block(part, name)]
        if layers and not last:
            continue
        heads.update(last[-1:] if len(layers) > HEAD_LAYERS else part.modules())
    return heads


def _parts(module: nn.Module, base: nn.Module) -> Iterator[nn.Module]:
    """The parts of a model outside of its base model, each as large as it can be; lists are taken apart."""
    inside = {id(m) for m in base.modules()}
    for child in module.children():
        if id(child) in inside:
            continue
        if isinstance(child, nn.ModuleList | nn.ModuleDict) or any(m is base for m in child.modules()):
            yield from _parts(child, base)
        else:
            yield child


def _in_a_block(part: nn.Module, name: str) -> bool:
    """Whether a layer is inside of an entry of a list: a list of layers is an MLP, one of blocks a stack."""
    path = name.split(".")
    return any(isinstance(part.get_submodule(".".join(path[:depth])), nn.ModuleList) for depth in range(len(path) - 1))


def other_kinds(model: nn.Module, layer: type[QuantizedWeight] | None) -> dict[str, str]:
    """Module name -> why it stays float in a format whose layers have a class of their own
    (:attr:`quanto_hf.io.formats.Format.layer`): it is of another type than those.

    Args:
        model: usually on meta.
        layer: the class; None is a format for all types.
    """
    if layer is None:
        return {}
    found = ((name, module, entry_of(module)) for name, module in model.named_modules())
    return {
        name: f"the format has no {type(module).__name__}"
        for name, module, entry in found
        if entry is not None and not issubclass(layer, entry.quantized)
    }
