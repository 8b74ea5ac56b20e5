"""How far a quantized language model is from the float one: perplexity and Kullback-Leibler divergence."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quanto_hf.flow.undisturbed import undisturbed


@dataclass(frozen=True)
class Evaluation:
    """Result of :func:`evaluate`.

    Args:
        perplexity: exp of the mean negative log likelihood per predicted token.
        kl: mean over predicted tokens of KL(reference || model) in nats; None without a reference.
        tokens: number of predicted tokens.
    """

    perplexity: float
    kl: float | None
    tokens: int


def windows(tokens: Iterable[int], length: int) -> torch.Tensor:
    """Non-overlapping windows of ``length`` tokens, shape (windows, length); a shorter rest is dropped.

    Raises:
        ValueError: there are fewer tokens than one window takes.
    """
    flat = torch.tensor(list(tokens), dtype=torch.long)
    count = flat.numel() // length
    if count == 0:
        raise ValueError(f"the text has {flat.numel()} tokens, but one window takes {length}; give a longer text")
    return flat[: count * length].view(count, length)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    inputs: torch.Tensor,
    reference: nn.Module | None = None,
    batch_size: int = 8,
    progress: Callable[[int], Any] | None = None,
) -> Evaluation:
    """Perplexity of a causal language model, and its divergence from a reference.

    Every token of a window but the first is predicted from the ones before it in the window.

    Args:
        model: called with ``input_ids``; its result has ``logits`` of shape (batch, length, vocabulary).
        inputs: token ids, shape (windows, length), as of :func:`windows`.
        reference: the float model, or None.
        batch_size: windows that are run at a time.
        progress: called with the number of windows done after each batch.

    Both models are run in evaluation mode, without dropout, and are as they were afterwards.
    """
    with undisturbed(model), nullcontext() if reference is None else undisturbed(reference):
        return _evaluate(model, inputs, reference, batch_size, progress)


def _evaluate(
    model: nn.Module,
    inputs: torch.Tensor,
    reference: nn.Module | None,
    batch_size: int,
    progress: Callable[[int], Any] | None,
) -> Evaluation:
    loss = divergence = 0.0
    for start in range(0, inputs.shape[0], batch_size):
        batch = inputs[start : start + batch_size]
        predicted = _log_probabilities(model, batch)
        loss -= float(predicted.gather(-1, batch[:, 1:, None].to(predicted.device)).double().sum())
        if reference is not None:
            wanted = _log_probabilities(reference, batch).to(predicted.device)
            divergence += float((wanted.exp() * (wanted - predicted)).double().sum())
        if progress is not None:
            progress(start + batch.shape[0])
    tokens = inputs.shape[0] * (inputs.shape[1] - 1)
    perplexity = float(torch.tensor(loss / tokens, dtype=torch.float64).exp())
    return Evaluation(perplexity, None if reference is None else divergence / tokens, tokens)


def _log_probabilities(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    device = next(model.parameters()).device
    logits: torch.Tensor = model(input_ids=batch.to(device)).logits
    return logits[:, :-1].float().log_softmax(-1)
