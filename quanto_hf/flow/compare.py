"""Which layer of a quantized model hurts: every layer compared with the float one."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from quanto_hf.flow.batches import batches
from quanto_hf.flow.compare_run import compare_batch
from quanto_hf.flow.comparison import Comparison, LayerRow
from quanto_hf.flow.errors import Errors
from quanto_hf.flow.patterns import first_match, unmatched
from quanto_hf.flow.saturation import weight_errors
from quanto_hf.flow.undisturbed import undisturbed


@torch.no_grad()
def compare(
    model: nn.Module,
    qmodel: nn.Module,
    data: Any,
    *,
    layers: str | Iterable[str] | None = None,
    parents: bool = False,
    keep_bytes: int = 1 << 30,
) -> Comparison:
    """Compare the output of every quantized layer with that of its float layer.

    Two errors are measured. The *own* error is that of the quantized layer for the input that its float layer gets. The
    *accumulated* error is that of its output while the whole quantized model runs. Several batches are summed up, as if
    they were one. Both models run in eval mode, and are afterwards what they were before, observers included.

    Outputs of the float model are held on the CPU until the quantized model has come as far. If they would take more
    than ``keep_bytes``, the models run several times, for some of the layers each time.

    Args:
        model: the float model.
        qmodel: the quantized model, frozen or not: its modules have the names of the float ones. A layer is a module of
            another type than the float one, and so are all modules that ``layers`` names.
        data: one batch (a tensor, a tuple of arguments, a dict) or an iterable of batches.
        layers: patterns of layers to compare (whole name segments or globs); None means all.
        parents: also compare the outputs of the modules that contain a layer, up to the model itself.
        keep_bytes: limit of what is held. The outputs of one layer are held in any case.

    Raises:
        ValueError: there is nothing to compare, or a pattern names nothing.
        TypeError: ``data`` is no batch.

    Example:
        >>> from quanto_hf import freeze, quantize
        >>> import copy
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> comparison = compare(model, freeze(quantize(copy.deepcopy(model), weights="int8")), torch.randn(32, 64))
        >>> [row.name for row in comparison.rows], min(row.own.sqnr for row in comparison.rows) > 35
        (['0', '2'], True)
    """
    pairs = _pairs(model, qmodel, layers)
    found = {name: _row(name, *pair) for name, pair in pairs.items()}
    if parents:
        shared = _shared(model, qmodel)
        for name in _ancestors(list(pairs)) & set(shared):
            pairs[name] = shared[name]
            found[name] = LayerRow(name, type(shared[name][1]).__name__)
    rows = {name: found[name] for name, _ in qmodel.named_modules() if name in found}
    with undisturbed(model), undisturbed(qmodel):
        for batch in batches(data):
            compare_batch(model, qmodel, batch, pairs, rows, keep_bytes)
    made = []
    for row in rows.values():
        if not row.accumulated.count and not row.note:
            if row.own is None:
                # a list of layers, which is never called
                continue
            row.note = "it was not called"
        made.append(row)
    return Comparison(made)


def _shared(model: nn.Module, qmodel: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    # under all of its names: a module that the float model has twice may be two in the quantized one
    floats = dict(model.named_modules(remove_duplicate=False))
    return {name: (floats[name], module) for name, module in qmodel.named_modules() if name in floats}


def _pairs(
    model: nn.Module, qmodel: nn.Module, layers: str | Iterable[str] | None
) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Name -> (float layer, quantized layer)."""
    if model is qmodel:
        raise ValueError("both models are the same object; quantize a copy (copy.deepcopy), and compare that")
    shared = _shared(model, qmodel)
    if layers is not None:
        patterns = [layers] if isinstance(layers, str) else list(layers)
        if sentences := unmatched([name for name in shared if name], patterns):
            raise ValueError("; ".join(sentences))
        found = {name: pair for name, pair in shared.items() if name and first_match(name, patterns) is not None}
    else:
        found = {name: pair for name, pair in shared.items() if type(pair[0]) is not type(pair[1])}
    # what contains a layer is none: the class of the model itself may differ
    outer = _ancestors(list(found))
    if not found:
        raise ValueError(
            "there is nothing to compare: no module of the quantized model has the name of a float one and another "
            "type. Quantize the second model, or name layers to compare: compare(..., layers='*')"
        )
    return {name: pair for name, pair in found.items() if name not in outer}


def _ancestors(names: list[str]) -> set[str]:
    """Names of the modules that contain one of these."""
    segments = [name.split(".") for name in names if name]
    return {".".join(parts[:end]) for parts in segments for end in range(len(parts))}


def _row(name: str, source: nn.Module, module: nn.Module) -> LayerRow:
    stored = str(getattr(module, "scheme", None) or type(module).__name__)
    weight, ends = weight_errors(module, source)
    return LayerRow(name, stored, own=Errors(), weight=weight, ends=ends)
