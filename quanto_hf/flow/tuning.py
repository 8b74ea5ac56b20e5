"""Fine-tuning of codebooks and scales by gradient, with the codes as they are."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from quanto_hf.flow.batches import batches, call
from quanto_hf.nn.qlinear import LinearProduct
from quanto_hf.schemes import Trainable

# The learning rate of Adam: a share of the size of codebook entries and scales, which are all about 1 times the scale.
RATE = 3e-3

# A block that is called several times must not add to the cache of the model that was run.
WITHOUT_CACHE = {"past_key_values": None, "past_key_value": None, "use_cache": False}


class _Trained:
    """A frozen layer that computes with values that have gradients."""

    def __init__(self, layer: LinearProduct, part: Trainable) -> None:
        self.layer, self.part = layer, part

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        bias: torch.Tensor | None = self.layer._parameters["bias"]
        weight = self.part.weight().to(input.dtype)
        return F.linear(input, weight, None if bias is None else bias.to(input.dtype))


@contextmanager
def _training(trained: Sequence[_Trained]) -> Iterator[None]:
    # accelerate's hooks stand there
    before = [part.layer.__dict__.get("forward") for part in trained]
    try:
        for part in trained:
            part.layer.forward = part.forward  # type: ignore[method-assign]
        yield
    finally:
        for part, forward in zip(trained, before, strict=True):
            if forward is None:
                part.layer.__dict__.pop("forward", None)
            else:
                part.layer.forward = forward  # type: ignore[method-assign]


def tune_codebooks(
    module: nn.Module,
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], torch.Tensor],
    *,
    epochs: int = 3,
    rate: float = RATE,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[float, float]:
    """Train codebooks and scales of all AQLM layers of a module, in place. Codes and all other parameters stay.

    Adam, with a learning rate that falls to 0 along a cosine. If the loss of the rounded result is not lower in the
    end, everything is as it was.

    Args:
        module: a model or a part of it, with frozen AQLM layers.
        batches: what ``loss`` takes.
        loss: of the module and a batch: a tensor without dimensions, the mean over what is in the batch.
        epochs: runs over all batches.
        rate: highest learning rate, as a share of the size of codebook entries and scales.
        progress: called with the steps that are done and all steps.

    Returns:
        The mean loss before and after.

    Raises:
        ValueError: there is no AQLM layer, or no batch.
    """
    layers = [m for m in module.modules() if isinstance(m, LinearProduct) and m.is_frozen]
    trained = [_Trained(m, part) for m in layers if (part := m.scheme.trainable(m.tensors())) is not None]
    if not trained:
        raise ValueError("there is no frozen AQLM layer to tune; freeze(quantize(model, 'aqlm-2x8')) makes them")
    if not batches:
        raise ValueError("there is no batch to tune with")
    before = _mean_loss(module, batches, loss)
    kept = [{name: tensor.clone() for name, tensor in part.layer.tensors().items()} for part in trained]
    frozen = [p for p in module.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad(), _training(trained):
            values = [value for each in trained for value in each.part.values]
            optimizer = torch.optim.Adam(values, lr=rate, betas=(0.9, 0.95))
            steps = epochs * len(batches)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            for step in range(steps):
                optimizer.zero_grad(set_to_none=True)
                loss(module, batches[step % len(batches)]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                if progress is not None:
                    progress(step + 1, steps)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    with torch.no_grad():
        for each in trained:
            each.part.store()
        after = _mean_loss(module, batches, loss)
        if not after < before:
            for each, tensors in zip(trained, kept, strict=True):
                for name, tensor in each.layer.tensors().items():
                    tensor.copy_(tensors[name])
            after = before
    return before, after


def tune_end_to_end(
    model: nn.Module, teacher: nn.Module, data: Iterable[Any], *, epochs: int = 3, rate: float = RATE
) -> tuple[float, float]:
    """Train codebooks and scales of a language model to predict what the float model predicts.

    The loss is the mean KL(teacher || model) per token.

    Args:
        model: with frozen AQLM layers.
        teacher: the float model.
        data: batches for both: dicts of keyword arguments, tuples of positional ones, or one argument. Results have
            ``logits``.
        epochs: see :func:`tune_codebooks`.
        rate: see there.

    Returns:
        The mean loss before and after.

    Raises:
        ValueError: see there.
    """

    def divergence(student: nn.Module, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            wanted = call(teacher, batch).logits.float().log_softmax(-1)
        predicted = call(student, batch).logits.float().log_softmax(-1)
        return F.kl_div(predicted, wanted.to(predicted.device), log_target=True, reduction="none").sum(-1).mean()

    return tune_codebooks(model, list(batches(data)), divergence, epochs=epochs, rate=rate)


def tune_blocks(
    model: nn.Module,
    teacher: nn.Module,
    data: Iterable[Any],
    blocks: Iterable[str],
    *,
    epochs: int = 5,
    rate: float = RATE,
) -> dict[str, tuple[float, float]]:
    """Train codebooks and scales block by block: each is to give what the float block gives for the same inputs.

    A block sees the inputs that the blocks before it, tuned already, pass on. The loss is the squared error over the
    square of the float block's output.

    Args:
        model: with frozen AQLM layers.
        teacher: the float model, with the same names.
        data: see :func:`tune_end_to_end`.
        blocks: names of modules, in the order in which they are run, such as ``model.layers.0``.
        epochs: see :func:`tune_codebooks`.
        rate: see there.

    Returns:
        Name of a block -> its mean loss before and after.

    Raises:
        ValueError: see there, or no data reached a block.
    """
    data, found = list(batches(data)), {}
    for name in blocks:
        block, exact = model.get_submodule(name), teacher.get_submodule(name)
        calls = _calls(model, block, data)
        if not calls:
            raise ValueError(f"no data reached {name}")
        with torch.no_grad():
            seen = [(args, kwargs, _first(exact(*args, **kwargs))) for args, kwargs in calls]

        def difference(module: nn.Module, batch: Any) -> torch.Tensor:
            args, kwargs, wanted = batch
            made, exact = _first(module(*args, **kwargs)).float(), wanted.float()
            error: torch.Tensor = (made - exact).square().mean() / exact.square().mean().clamp(min=1e-30)
            return error

        found[name] = tune_codebooks(block, seen, difference, epochs=epochs, rate=rate)
    return found


@torch.no_grad()
def _calls(model: nn.Module, block: nn.Module, data: Iterable[Any]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments with which a block is called while the model runs over data."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, {**kwargs, **{name: value for name, value in WITHOUT_CACHE.items() if name in kwargs}}))

    hook = block.register_forward_pre_hook(note, with_kwargs=True)
    try:
        for batch in data:
            call(model, batch)
    finally:
        hook.remove()
    return calls


def _first(result: Any) -> torch.Tensor:
    """The hidden states of a block: its result, or the first part of it."""
    first: torch.Tensor = result[0] if isinstance(result, tuple | list) else result
    return first


@torch.no_grad()
def _mean_loss(module: nn.Module, batches: Sequence[Any], loss: Callable[[nn.Module, Any], torch.Tensor]) -> float:
    return sum(float(loss(module, batch)) for batch in batches) / len(batches)
