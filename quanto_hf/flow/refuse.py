"""Models that a verb cannot take, told before anything is changed."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from quanto_hf.fit import Fit
from quanto_hf.flow.choice import Choice
from quanto_hf.nn import QuantizedInput, QuantizedWeight
from quanto_hf.nn.learned import LearnedScales
from quanto_hf.nn.slots import find, module_at
from quanto_hf.qtypes import QType

# of weights that can be quantized
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# names in an error
SOME = 3


def refuse_other_dtypes(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse weights in a dtype that no quantized layer has.

    Args:
        model: may be on meta.
        names: of the slots that are to be quantized.

    Raises:
        ValueError: a weight is not in float32, bfloat16 or float16; the text names modules and dtypes.
    """
    found = {name: find(model, name) for name in names}
    floats = {name: module_at(model, owner)._parameters.get(leaf) for name, (owner, leaf) in found.items()}
    wrong = {name: weight.dtype for name, weight in floats.items() if weight is not None and weight.dtype not in DTYPES}
    if wrong:
        first = next(iter(wrong.values()))
        advice = "convert them with model.float()" if first == torch.float64 else "convert them to float32"
        said = _some([f"{name or type(model).__name__} ({dtype})" for name, dtype in wrong.items()])
        raise ValueError(
            f"{said}: a weight that is quantized is in float32, bfloat16 or float16; {advice}, or exclude these modules"
        )


def refuse_quantized(
    model: nn.Module,
    asked: Mapping[str, Choice],
    activations: QType | None,
    static: bool,
    learn: bool,
) -> None:
    """Refuse to quantize layers a second time: they would stay as they are.

    Args:
        model: with layers that are quantized already.
        asked: name of each slot that the patterns ask for -> how it would be quantized were it float.
        activations: number type for inputs, or None.
        static: whether these have one scale.
        learn: whether scales are trained.

    Raises:
        ValueError: a layer is quantized in another way than it is asked for.
    """
    found = []
    for name, choice in asked.items():
        owner, leaf = find(model, name)
        layer = model.get_submodule(owner)
        assert isinstance(layer, QuantizedWeight)
        slot = layer.slot(leaf)
        same = layer.scheme_of(slot) == choice.scheme() and _same_fit(layer.fit_of(slot), choice.fit)
        if isinstance(layer, QuantizedInput) and layer.rounds_inputs:
            same = same and layer.activations == activations and (layer.is_static or not static)
        if isinstance(layer, LearnedScales):
            same = same and (layer.learns or not learn)
        if not same:
            found.append(f"{name} ({layer.scheme_of(slot)})")
    if found:
        raise ValueError(
            f"quantized already: {_some(found)}. To quantize these anew, call quanto_hf.dequantize(model) first, or "
            f"begin with the float model; to quantize only what is still float, name it with include=, or leave these "
            f"out with exclude="
        )


def _same_fit(held: Fit | str | None, asked: Fit | str | None) -> bool:
    """Whether a fit is asked for that a layer has; None asks for nothing."""
    return asked is None or held == asked or getattr(held, "name", held) == asked


def _some(texts: list[str]) -> str:
    more = len(texts) - SOME
    return ", ".join(texts[:SOME]) + (f" and {more} more" if more > 0 else "")
