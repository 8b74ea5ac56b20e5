"""SmoothQuant: outliers of activations are moved into the weights, where they cost less."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quanto_hf.flow.channels import Flow
from quanto_hf.flow.folding import Folding
from quanto_hf.flow.patterns import first_match
from quanto_hf.flow.smooth_run import Seen, fold_all, watch
from quanto_hf.flow.undisturbed import undisturbed
from quanto_hf.nn import QMODULES

# Scales beyond these are not needed (an outlier of 1000 times the others asks for 32), and would leave float16.
LARGEST_EXPONENT = 12


@dataclass(frozen=True)
class Fold:
    """One pair that was folded.

    Args:
        source: name of the norm or linear layer whose output channels were divided.
        layers: names of the linear layers whose input channels were multiplied.
        scale: float32, shape (channels,).
    """

    source: str
    layers: tuple[str, ...]
    scale: torch.Tensor

    def __str__(self) -> str:
        low, high = self.scale.aminmax()
        return f"{self.source} -> {', '.join(self.layers)}: scales {low:g} to {high:g}"


@dataclass
class Smoothing:
    """What :func:`smooth` did. It is the list of its folds; ``str`` of it has a line for each fold and each layer.

    Args:
        folds: what was folded, in the order of the model.
        left: name of a linear layer whose input was left as it is -> why.
    """

    folds: list[Fold] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Fold]:
        return iter(self.folds)

    def __len__(self) -> int:
        return len(self.folds)

    def __getitem__(self, index: int) -> Fold:
        return self.folds[index]

    def __str__(self) -> str:
        return "\n".join([*map(str, self.folds), *(f"{name}: not smoothed: {why}" for name, why in self.left.items())])


@torch.no_grad()
def smooth(
    model: nn.Module,
    data: Any,
    alpha: float = 0.5,
    *,
    powers_of_two: bool = True,
    exclude: str | Iterable[str] = ("lm_head",),
) -> Smoothing:
    """Move outliers of activations into the weights of the linear layers that read them, in place.

    Input channel j of a linear layer is divided by s_j = max|x_j| ** alpha / max|w_j| ** (1 - alpha) and its weight
    multiplied by it (Xiao et al., "SmoothQuant", 2022, https://arxiv.org/abs/2211.10438). The division is folded into
    what makes the input: a norm, or a linear layer. Which that is, is seen in a forward pass, whatever the modules are
    called: between the two there may only be what keeps channels apart, and scales with them (reshapes, casts, ReLU, a
    product with something else), and all that reads the output must be linear layers. Scales are rounded to powers of
    two, which cost no bit of any weight: the float outputs stay equal. They are compared, and a fold that changes them
    by more than a rounding of their dtype (1e-5 in float32) is undone.

    Args:
        model: a float model, before it is quantized.
        data: one batch (a tensor, a tuple of arguments, a dict) or an iterable of batches. Statistics are the largest
            values over all of them; the first is also used to watch and to compare.
        alpha: from 0 (all is left to the activations) to 1 (all outliers go into the weights).
        powers_of_two: False takes the scales of the formula as they are. Static int8 activations are better with them,
            and each weight is rounded to its dtype once more, which changes float outputs a little.
        exclude: patterns of linear layers that are not going to be quantized: nothing is folded for their sake.

    Returns:
        The folds, and for each other linear layer the reason.

    Raises:
        ValueError: the model has quantized layers or offloaded weights, ``alpha`` is out of range, or there is no data.
            Nothing has been changed then.
        TypeError: ``data`` is no batch.

    Example:
        >>> model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> for fold in smooth(model, torch.randn(16, 64)):
        ...     print(fold.source, *fold.layers)
        0 1
        1 3
    """
    _check(model, alpha)
    excluded = [exclude] if isinstance(exclude, str) else list(exclude)
    with undisturbed(model):
        seen = watch(model, data)
        planned, left = _plan(model, seen, alpha, powers_of_two, excluded)
        refused = fold_all(model, seen, planned)
    left.update({layer: why for folding, why in refused.items() for layer in folding.layers})
    names = {module: name for name, module in model.named_modules()}
    folds = [
        Fold(names[f.flow.module], tuple(names[layer] for layer in f.layers), f.scale)
        for f in planned
        if f not in refused
    ]
    return Smoothing(folds, {names[layer]: left[layer] for layer in names if layer in left})


def _check(model: nn.Module, alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r} is not between 0 and 1; 0.5 serves most models")
    for name, module in model.named_modules():
        if isinstance(module, tuple(QMODULES.values())):
            raise ValueError(f"{name} is a {type(module).__name__}: smooth the float model first, then quantize it")
        if any(p.device.type == "meta" for p in module.parameters(recurse=False)):
            raise ValueError(f"the weights of {name} are offloaded or on meta; load the model into memory to smooth it")


def _plan(
    model: nn.Module, seen: Seen, alpha: float, powers_of_two: bool, excluded: list[str]
) -> tuple[list[Folding], dict[nn.Linear, str]]:
    """The folds that are possible, and for all other linear layers the reason why they have none."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    planned: list[Folding] = []
    taken: set[nn.Linear] = set()
    left: dict[nn.Linear, str] = {}
    order = {module: number for number, module in enumerate(model.modules())}
    names = {module: name for name, module in model.named_modules()}
    wanted = [
        module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and first_match(name, excluded) is None
    ]
    for flow in seen.flows:
        layers = sorted(flow.consumers, key=order.__getitem__)
        asked = [layer for layer in layers if layer in wanted]
        if not asked:
            continue
        reason = _against(flow, layers, seen, owners, taken)
        scale = None
        if not reason:
            scale = _scale([(seen.peaks[layer], layer.weight) for layer in asked], alpha, powers_of_two)
            reason = "activations or weights are not finite" if scale is None else ""
        if scale is None:
            for layer in asked:
                left.setdefault(layer, f"{names[flow.module]} cannot be scaled: {reason}")
            continue
        taken.update(layers)
        planned.append(Folding(flow, layers, scale))
    for layer in wanted:
        if layer not in seen.inputs:
            left[layer] = "it was not called"
        elif layer not in taken:
            left.setdefault(layer, "between it and the last norm or linear layer channels are mixed or bent")
    return planned, {layer: why for layer, why in left.items() if layer not in taken}


def _against(flow: Flow, layers: list[nn.Linear], seen: Seen, owners: Counter[int], taken: set[nn.Linear]) -> str:
    """What speaks against a fold, or nothing."""
    if flow.reason:
        return flow.reason
    for module in (flow.module, *layers):
        if any(owners[id(p)] > 1 for p in module._parameters.values() if p is not None):
            return "one of the weights is shared with another module"
    if taken & set(layers):
        return "one of its readers is smoothed already"
    if any(flow not in call for layer in layers for call in seen.inputs[layer]):
        return "one of its readers has another input as well"
    if any(not layer.weight.is_floating_point() for layer in layers):
        return "one of its readers has no float weight"
    return ""


def _scale(pairs: list[tuple[torch.Tensor, torch.Tensor]], alpha: float, powers_of_two: bool) -> torch.Tensor | None:
    """Scales from (largest input of each channel, weight) of the layers that share an input; None if a number
    is not finite. A channel without any input, or weight, keeps 1."""
    device = pairs[0][0].device
    peak = torch.stack([peak.to(device) for peak, _ in pairs]).amax(0)
    weight = torch.stack([weight.detach().abs().amax(0).to(device, torch.float32) for _, weight in pairs]).amax(0)
    if not (peak.isfinite().all() and weight.isfinite().all()):
        return None
    exponent = alpha * peak.log2() - (1 - alpha) * weight.log2()
    exponent = torch.where((peak > 0) & (weight > 0), exponent, 0.0)
    exponent = exponent.round() if powers_of_two else exponent
    return exponent.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).exp2()
