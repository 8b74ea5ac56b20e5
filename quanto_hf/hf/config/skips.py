"""Modules of a transformers model that stay float by default, each with its reason."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from quanto_hf.flow import matches
from quanto_hf.flow.patterns import any_names
from quanto_hf.flow.routers import routers
from quanto_hf.nn import QuantizedWeight
from quanto_hf.nn.registry import entry_of
from quanto_hf.nn.slots import WEIGHT

# Layers with a weight of a part outside of the base model, up to which the part is a head, and not a network. Of the
# families of transformers no head has more (Splinter), and no network fewer than 25 (the decoder of VideoMAE).
HEAD_LAYERS = 6
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def default_skips(
    model: Any, dtype: torch.dtype, heads: bool = True, asked: Iterable[str] = (), embeddings: bool = False
) -> dict[str, str]:
    """Module name -> why it stays float. (Tied weights: :func:`quanto_hf.flow.assign`.)

    Args:
        model: a PreTrainedModel, usually on meta.
        dtype: the dtype in which it is loaded.
        heads: also the output head, task heads (:func:`task_heads`), and routers and gates
            (:func:`quanto_hf.flow.routers.routers`).
        asked: patterns that ask for heads, routers and gates all the same.
        embeddings: whether embeddings and the output head are asked for.
    """
    skips: dict[str, str] = {}
    for pattern in model._get_dtype_plan(dtype):
        for name, _ in model.named_modules():
            if matches(name, pattern):
                skips.setdefault(name, "the model keeps it in float32")
    asked = list(asked)
    if embeddings:
        skips.update({n: reason for n, reason in special_tables(model).items() if not any_names([n], asked)})
    if not heads:
        return skips
    outputs, ends = output_heads(model), task_heads(model)
    for name, module in model.named_modules():
        if any_names([name], asked) or (embeddings and name in outputs):
            continue
        if name in outputs:
            skips.setdefault(name, "the output head stays float by default")
        elif module in ends:
            skips.setdefault(name, "task heads stay float by default")
    return {**routers(model, getattr(model, "config", None), asked), **skips}


def output_heads(model: Any) -> set[str]:
    """Names of the modules that transformers knows as the output head (a linear layer, or a list of some), and of
    linear layers with the weight of an embedding (the second head of LUKE, over entities)."""
    output = model.get_output_embeddings()
    parts = set(output.modules()) if isinstance(output, nn.Module) else set()
    for pair in model.all_tied_weights_keys.items():
        tied = [model.get_submodule(name.rpartition(".")[0]) for name in pair]
        if any(isinstance(module, nn.Embedding) for module in tied):
            parts.update(module for module in tied if isinstance(module, nn.Linear))
    return {name for name, module in model.named_modules() if module in parts}


# methods of embeddings that transformers calls to fill them
FILLS = ("create_weight", "make_weight")


def special_tables(model: Any) -> dict[str, str]:
    """Name of an embedding -> why it is none of those that are meant by ``embeddings``: it is a fixed table that the
    model computes (sinusoids), or holds one number per head of attention, which is added to scores (T5)."""
    computed = set(model._keys_to_ignore_on_save or ())
    heads = {
        count
        for part in model.modules()
        if (config := getattr(part, "config", None)) is not None
        for key in ("num_attention_heads", "num_heads")
        if isinstance(count := _of_all_layers(config, key), int)
    }
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding):
            continue
        if f"{name}.{WEIGHT}" in computed or any(hasattr(module, method) for method in FILLS):
            found[name] = "the model computes it"
        elif module.embedding_dim in heads:
            found[name] = "it has one number for each head of attention"
    return found


def _of_all_layers(config: Any, key: str) -> Any:
    """A value of a config, or None where it has none, or one per layer: transformers raises a RuntimeError then."""
    try:
        return getattr(config, key, None)
    except RuntimeError:
        return None


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
