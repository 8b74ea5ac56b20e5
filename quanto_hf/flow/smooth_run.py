"""Running a model for :func:`quanto_hf.flow.smooth`: statistics, and the check that nothing changed."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quanto_hf.flow.batches import batches, call, tensors_of
from quanto_hf.flow.channels import Flow, watching
from quanto_hf.flow.errors import Errors
from quanto_hf.flow.folding import Folding, NotExact, tolerance


@dataclass
class Seen:
    """What was seen of a model.

    Args:
        flows: of each norm and linear layer, in the order in which they were called.
        inputs: linear layer -> which flows its input carried, call by call.
        peaks: linear layer -> largest absolute value of each input channel, float32.
        batch: the first batch.
        outputs: what the model made of it.
    """

    flows: list[Flow]
    inputs: dict[nn.Module, list[frozenset[Flow]]]
    peaks: dict[nn.Module, torch.Tensor]
    batch: Any
    outputs: list[torch.Tensor]


def watch(model: nn.Module, data: Any) -> Seen:
    """Run all batches, and watch the first one operator by operator.

    Raises:
        ValueError: there is no batch.
    """
    peaks: dict[nn.Module, torch.Tensor] = {}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = tensors_of((args, kwargs))[0]
        if x.numel():
            peak = x.detach().abs().reshape(-1, x.shape[-1]).amax(0).float()
            peaks[module] = torch.maximum(peaks[module], peak) if module in peaks else peak

    seen: Seen | None = None
    with ExitStack() as hooks:
        for batch in batches(data):
            if seen is not None:
                call(model, batch)
                continue
            with watching(model) as watched:
                # behind the hooks that watch: what stands inside of a layer is not looked into
                for module in model.modules():
                    if type(module) is nn.Linear:
                        hooks.enter_context(module.register_forward_pre_hook(note, with_kwargs=True))
                output = call(model, batch)
                watched.finish(output)
            outputs = [tensor.detach().clone() for tensor in tensors_of(output)]
            seen = Seen(list(watched.flows.values()), watched.inputs, peaks, batch, outputs)
    if seen is None or not peaks:
        raise ValueError("there is no data, or no linear layer has been called with any")
    return seen


def fold_all(model: nn.Module, seen: Seen, planned: list[Folding]) -> dict[Folding, str]:
    """Fold what is planned, in place, and compare the outputs with those from before.

    One comparison serves all folds, unless something has changed: then every fold is tried by itself.

    Returns:
        Folding -> why it was undone.
    """
    refused: dict[Folding, str] = {}
    done: list[Folding] = []
    try:
        for folding in planned:
            if why := _apply(folding):
                refused[folding] = why
            else:
                done.append(folding)
        if done and _difference(model, seen):
            for folding in reversed(done):
                folding.undo()
            tried, done = done, []
            for folding in tried:
                why = _apply(folding)
                done.append(folding)
                if why := why or _difference(model, seen):
                    done.pop().undo()
                    refused[folding] = why
    except BaseException:
        for folding in reversed(done):
            folding.undo()
        raise
    for folding in done:
        folding.done()
    return refused


def _apply(folding: Folding) -> str:
    try:
        folding.apply()
    except NotExact as reason:
        return str(reason)
    return ""


def _difference(model: nn.Module, seen: Seen) -> str:
    """What has changed, or nothing."""
    made = tensors_of(call(model, seen.batch))
    for one, other in zip(made, seen.outputs, strict=True):
        errors = Errors()
        errors.add(one, other)
        # not a > b: NaN is a difference
        if not errors.relative <= tolerance(other.dtype):
            return f"the outputs of the model changed by {errors.relative:.1e}"
    return ""
