"""The verbs for plain torch models: quantize, freeze, requantize, dequantize, quantization_map.

The names and meanings are those of optimum-quanto.
"""

import os
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from quanto_hf.fit import Fit
from quanto_hf.flow.applying import apply_assignment, replace_modules
from quanto_hf.flow.assign import asked_by, assign
from quanto_hf.flow.choice import Choice, embeddings_choice
from quanto_hf.flow.making import MOMENT_BYTES, make_layers, waiting_layers
from quanto_hf.flow.notes import warn_of_notes
from quanto_hf.flow.patterns import any_names, first_match
from quanto_hf.flow.refuse import refuse_other_dtypes, refuse_quantized
from quanto_hf.flow.routers import routers
from quanto_hf.flow.ties import Ties, pack, share_packed, tied_slots, to_float
from quanto_hf.nn import QuantizedWeight
from quanto_hf.nn.registry import QUANTIZE
from quanto_hf.ops.scratch import free
from quanto_hf.qtypes import QTYPES, QType, qtype


def activation_names() -> list[str]:
    """Names of the number types to which activations can be rounded: those of 8 bits."""
    eight = [kind for kind in QTYPES.values() if kind.bits == 8 and kind.kind != "table"]
    return [name for kind in eight for name in (*kind.aliases, kind.name)]


def activation_type(activations: str | QType | None) -> QType | None:
    """The number type of activations.

    Raises:
        ValueError: it is not int8 or an 8-bit float.
    """
    if activations is None:
        return None
    try:
        kind = qtype(activations)
    except (ValueError, TypeError):
        # TypeError: a list, say, cannot be looked up
        kind = None
    if kind is None or kind.name not in activation_names():
        raise ValueError(
            f"activations={reprlib.repr(activations)} is not supported; choose None, {', '.join(activation_names())}"
        )
    return kind


def as_patterns(patterns: str | Iterable[str] | None) -> list[str] | None:
    """A list of patterns from one pattern, several, or None."""
    if patterns is None:
        return None
    return [patterns] if isinstance(patterns, str) else list(patterns)


def either(name: str, value: Any, older: str, older_value: Any) -> Any:
    """The value of an argument that has two names.

    Raises:
        ValueError: both are given.
    """
    if value is not None and older_value is not None:
        raise ValueError(f"{older}={older_value!r} means the same as {name}={value!r}; give {name} alone")
    return older_value if value is None else value


def quantize(
    model: nn.Module,
    weights: str | QType = "int8",
    activations: str | QType | None = None,
    *,
    static_activations: bool = False,
    learn_scales: bool = False,
    group_size: int | None = None,
    symmetric: bool | None = None,
    fit: Fit | str | None = None,
    include: str | Iterable[str] | None = None,
    modules_to_not_convert: str | Iterable[str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    optimizer: Fit | str | None = None,
    exclude: str | Iterable[str] | None = None,
    embeddings: str | QType | None = None,
) -> nn.Module:
    """Replace the linear layers and convolutions of a model by quantized ones, in place.

    The layers are PREPARED: they hold float weights and give what the packed ones would give, so that the model can be
    tried, and trained (QAT), before :func:`freeze` packs them.

    Args:
        model: any torch model. Weights that are tied to another parameter, a ``lm_head``, and routers and gates of
            experts (:mod:`quanto_hf.flow.routers`) stay float where neither ``embeddings`` nor a pattern asks for them.
        weights: a number type: int8, int4, int2, float8, nf4, fp4 ...
        activations: None, "int8" or "float8": also round the inputs of these layers, per token; inputs of int4 and
            int2 layers to int8 per 32 columns.
        static_activations: round them with one scale per layer that :class:`quanto_hf.Calibration` finds. The model
            refuses to run before.
        learn_scales: train scales (and zeros) of weights, and static ones of inputs, together with the weights.
        group_size: columns that share a scale, -1 for whole rows; None is the default of the type.
        symmetric: None is the default of the type.
        fit: what finds the scales: "absmax", "minmax", "mse", "hqq" or a :class:`quanto_hf.fit.Fit`; None is the
            default of the type.
        include: patterns of modules to quantize (whole name segments or globs); None means all. A router or gate, an
            embedding or a transposed convolution is quantized if a pattern, here or of ``overrides``, names it itself,
            and not only a module that it is in.
        modules_to_not_convert: patterns of modules that stay float.
        overrides: pattern -> values that differ there, such as ``{"*.down_proj": {"weights": "int8"}}``.
        optimizer: optimum-quanto's word for ``fit``.
        exclude: optimum-quanto's word for ``modules_to_not_convert``.
        embeddings: number type of embeddings and of the ``lm_head``, tied to one or not, with its defaults (int8 in
            groups of 64 columns); None leaves them in float. A weight that they share is packed once, by
            :func:`freeze`, and both hold it.

    Returns:
        The model itself.

    Raises:
        ValueError: a value is not allowed, the model is a bare linear layer, a weight is in float64 or another dtype
            that cannot be quantized, or a layer that the patterns ask for is quantized already in another way. Nothing
            has been changed then.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> freeze(quantize(model, weights="int4", modules_to_not_convert="2"))[0].scheme
        Affine(qtype='int4', group_size=64, symmetric=False)
    """
    fit = either("fit", fit, "optimizer", optimizer)
    modules_to_not_convert = either("modules_to_not_convert", modules_to_not_convert, "exclude", exclude)
    choice = Choice(weights, group_size, symmetric, fit)
    if (reason := choice.refusal(learn_scales)) is not None:
        raise ValueError(reason)
    kind = activation_type(activations)
    if static_activations and kind is None:
        raise ValueError("static_activations=True without activations; add activations='int8' or 'float8'")
    asked = Ties(model).asked([*(as_patterns(include) or ()), *asked_by(overrides)])
    outputs = {name for name, _ in model.named_modules() if name.rpartition(".")[2] == "lm_head"}
    skip = {
        name: "output heads stay float by default"
        for name in outputs
        if include is None and embeddings is None and not any_names([name], asked)
    }
    skip.update(routers(model, getattr(model, "config", None), asked))
    assignment = assign(
        model,
        choice,
        verb=QUANTIZE,
        include=as_patterns(include),
        exclude=as_patterns(modules_to_not_convert) or (),
        skip=skip,
        overrides=overrides,
        learn=learn_scales,
        embeddings=None if embeddings is None else embeddings_choice(embeddings),
        outputs=outputs,
    )
    refuse_other_dtypes(model, assignment.chosen)
    refuse_quantized(
        model,
        _quantized_again(model, choice, skip, include, modules_to_not_convert, overrides),
        kind,
        static_activations,
        learn_scales,
    )
    warn_of_notes(model, assignment)
    apply_assignment(model, assignment, kind, static_activations, learn_scales)
    # the search for scales to learn has filled them
    free()
    return model


def _quantized_again(
    model: nn.Module,
    choice: Choice,
    skip: Mapping[str, str],
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
    overrides: Mapping[str, Mapping[str, Any]] | None,
) -> dict[str, Choice]:
    """Slots that are quantized already, by name, and how :func:`quantize` would quantize them were they float."""
    included, excluded = as_patterns(include), as_patterns(exclude) or ()
    asked = [*(included or ()), *asked_by(overrides)]
    held = {
        slot.label(owner): owner
        for owner, module in model.named_modules()
        if isinstance(module, QuantizedWeight)
        for slot in module.slots
        if QUANTIZE in module.by_default or any_names({owner, slot.label(owner)}, asked)
    }
    found: dict[str, Choice] = {}
    for name, owner in held.items():
        if owner in skip or name in skip or first_match(name, excluded) is not None:
            continue
        if included is not None and first_match(name, included) is None:
            continue
        values = dict((overrides or {}).get(first_match(name, overrides or {}) or "", {}))
        if values.get("weights", "") is not None:
            found[name] = choice.override(values)
    return found


def freeze(
    model: nn.Module,
    data: Iterable[Any] | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    iterations: int | None = None,
    moment_bytes: int = MOMENT_BYTES,
    progress: bool = True,
) -> nn.Module:
    """Pack the weights of all quantized layers, in place, and let go of the float ones.

    With ``data``, schemes and fits that want to know what passes through the layers are told: AQLM, and fits with
    ``wants_moments``. Layers are then made in the order of the model, and see the data as those that are finished pass
    it on.

    Args:
        model: after :func:`quantize`.
        data: batches that can be read several times: a list, a DataLoader without shuffling. A batch is a dict of
            keyword arguments, a tuple of positional ones, or one argument. None: from the weights alone.
        folder: where finished layers are kept, so that the same call goes on after an interruption.
        seed: of what a fit draws at random.
        iterations: rounds of a fit that improves its result step by step; None is its own number.
        moment_bytes: memory for second moments of inputs; less of it means more runs over the data.
        progress: with data or a folder, show an estimate, and a bar with the time left, on stderr.

    Returns:
        The model itself.

    Raises:
        ValueError: a weight has NaN or infinite values, or a dtype that cannot be quantized, such as float64 (the text
            names the layer), or there is no data. Layers that are finished stay so.

    Warns:
        UserWarning: no data reached a layer that wants it, which is made from its weight alone; or no layer wants data.

    Example:
        >>> model = quantize(nn.Sequential(nn.Linear(64, 32)), "aqlm-2x4")
        >>> freeze(model, [torch.randn(100, 64)], progress=False)[0].weight_state.value
        'frozen'
    """
    if (data, folder, seed, iterations) != (None, None, 0, None):
        tied = tied_slots(model)
        # the other slots of a tied weight get what is made for the first one
        later = {slot.label(name) for _, *others in tied for name, _, slot in others}
        if layers := {name: layer for name, layer in waiting_layers(model).items() if name not in later}:
            make_layers(
                model, layers, data,
                folder=folder, seed=seed, iterations=iterations, moment_bytes=moment_bytes, progress=progress,
            )  # fmt: skip
        share_packed(tied)
        return model
    refuse_other_dtypes(model, waiting_layers(model))
    try:
        pack(model)
    finally:
        free()
    return model


def dequantize(model: nn.Module) -> nn.Module:
    """Replace all quantized layers by plain ones with the dequantized weights, in place.

    Returns:
        The model itself, or a plain layer if the model is a bare quantized one.
    """
    if isinstance(model, QuantizedWeight):
        made = model.to_float()
    else:
        made = model
        replace_modules(model, dict(to_float(model)))
    free()
    return made
