"""Both models run side by side, with hooks on the layers that are compared."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from quanto_hf.flow.batches import call, device_of, moved, tensors_of
from quanto_hf.flow.comparison import LayerRow
from quanto_hf.flow.errors import Errors
from quanto_hf.flow.saturation import clipped


class _Kept:
    """Outputs of float layers, one list of tensors for each call, up to a number of bytes.

    What a layer would add beyond the limit is not held, nor is anything else of it: it is a layer of the next pass. The
    first layer is held whatever it takes, so that every pass does at least one.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.calls: dict[str, list[list[torch.Tensor]]] = {}
        self.skipped: set[str] = set()
        self.held: dict[str, int] = {}
        self.total = 0

    def add(self, name: str, output: list[torch.Tensor]) -> None:
        """Hold the output of one call of a layer, or nothing of this layer any more."""
        if name in self.skipped:
            return
        size = sum(tensor.nbytes for tensor in output)
        held = self.held.get(name, 0)
        if self.total > held and self.total + size > self.limit:
            self.total -= self.held.pop(name, 0)
            self.calls.pop(name, None)
            self.skipped.add(name)
            return
        self.held[name] = held + size
        self.total += size
        # a copy: an activation that works in place may follow
        self.calls.setdefault(name, []).append([tensor.detach().to("cpu", copy=True) for tensor in output])


def compare_batch(
    model: nn.Module,
    qmodel: nn.Module,
    batch: Any,
    pairs: dict[str, tuple[nn.Module, nn.Module]],
    rows: dict[str, LayerRow],
    keep_bytes: int,
) -> None:
    """Run both models on one batch, as often as the limit makes necessary, and add what is found to the rows.

    Args:
        pairs: name -> (float module, quantized module).
        rows: name -> its row. Own errors are measured where the row has a place for them.
        keep_bytes: limit of the outputs that are held.
    """
    pending = list(rows)
    while pending:
        kept = _Kept(keep_bytes)
        own = len(pending) == len(rows)
        with ExitStack() as hooks:
            for name in pending:
                hooks.enter_context(_watch_float(kept, name, *pairs[name], rows[name].own if own else None))
            call(model, batch)
        with ExitStack() as hooks:
            for name in kept.calls:
                hooks.enter_context(_watch_quantized(kept.calls[name], pairs[name][1], rows[name]))
            call(qmodel, batch)
        for name, left in kept.calls.items():
            if left:
                _calls_differ(rows[name])
        pending = [name for name in pending if name in kept.skipped]


def _watch_float(kept: _Kept, name: str, source: nn.Module, module: nn.Module, own: Errors | None) -> RemovableHandle:
    def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        wanted = tensors_of(output)
        kept.add(name, wanted)
        if own is not None:
            device = device_of(module)
            made = tensors_of(module(*moved(args, device), **moved(kwargs, device)))
            for one, other in zip(made, wanted, strict=True):
                own.add(one, other)

    return source.register_forward_hook(hook, with_kwargs=True)


def _watch_quantized(calls: list[list[torch.Tensor]], module: nn.Module, row: LayerRow) -> RemovableHandle:
    def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for x in tensors_of((args, kwargs))[:1]:
            if row.own is not None and (hit := clipped(module, x)) is not None:
                row.clipping.add(hit)
        made = tensors_of(output)
        wanted = calls.pop(0) if calls else []
        if [tensor.shape for tensor in made] != [tensor.shape for tensor in wanted]:
            _calls_differ(row)
        elif not row.note:
            for one, other in zip(made, wanted, strict=True):
                row.accumulated.add(one, other)

    return module.register_forward_hook(hook, with_kwargs=True)


def _calls_differ(row: LayerRow) -> None:
    """Two outputs of which nobody knows whether they belong together are not compared."""
    row.accumulated = Errors()
    row.note = "the quantized model calls it differently, as where experts are chosen otherwise: own error only"
