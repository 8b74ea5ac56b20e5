"""Which slot of a model is quantized how while it loads: by the config, or by what a checkpoint says of itself."""

from collections.abc import Mapping
from typing import Any

import torch

from quanto_hf.flow import Assignment, Choice, asked_by, assign, first_match
from quanto_hf.flow.ties import Ties, as_label
from quanto_hf.hf.config.skips import default_skips, other_kinds, output_heads
from quanto_hf.hf.load.ties import float_ties
from quanto_hf.nn import qmodule_for
from quanto_hf.nn.slots import find, joined, label
from quanto_hf.schemes import Scheme


def new_assignment(model: Any, config: Any, dtype: torch.dtype) -> Assignment:
    """How each slot of a float model is quantized.

    Args:
        model: on meta.
        config: what was asked for.
        dtype: in which the model is loaded.
    """
    embeddings, ties = config.embeddings_choice(), float_ties(model)
    # what is tied to a module that is named is asked for with it
    asked = Ties(model, ties).asked(asked_by(config.overrides))
    skip = default_skips(model, dtype, config.default_skips, asked, embeddings is not None)
    return assign(
        model,
        config.choice(),
        exclude=config.modules_to_not_convert or (),
        skip={**skip, **other_kinds(model, type(config).format.layer)},
        overrides=config.overrides,
        learn=config.learn_scales,
        embeddings=embeddings,
        outputs=output_heads(model),
        ties=ties,
    )


def saved_assignment(model: Any, schemes: Mapping[str, Scheme], config: Any, dtype: torch.dtype) -> Assignment:
    """The assignment that was saved with a checkpoint, with names for this model class.

    Args:
        model: on meta.
        schemes: name of a slot, as it was saved -> how it is stored.
        config: of the checkpoint.
        dtype: in which the model is loaded.

    Raises:
        ValueError: the model does not have a slot of the checkpoint.
    """
    known = {
        label(name, leaf)
        for name, module in model.named_modules()
        if (cls := qmodule_for(module)) is not None
        for leaf in cls.slot_names
    }
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    chosen: dict[str, Choice] = {}
    absent: list[str] = []
    for saved, scheme in schemes.items():
        # a head was added or removed: AutoModel loads what AutoModelForCausalLM saved, and the other way round
        names = (saved, saved.removeprefix(prefix), prefix + saved)
        name = next((name for name in names if name in known), None)
        if name is None:
            absent.append(saved)
        else:
            chosen[name] = Choice(scheme, fit=_saved_fit(config, saved))
    if absent and (not chosen or was_written_from(model)):
        raise ValueError(
            f"{len(absent)} of the {len(schemes)} quantized modules of the checkpoint are not in "
            f"{type(model).__name__}; the first one is {absent[0]!r}"
        )
    _complete_ties(model, chosen)
    # for the reasons only: an entry of 'schemes' counts more than a default
    skip = default_skips(model, dtype, config.default_skips)
    skip.update((name, "it was saved in float") for name in known if name not in chosen and name not in skip)
    left = assign(model, config.choice(), skip=skip, ties=float_ties(model)).left
    return Assignment(chosen, {name: reason for name, reason in left.items() if name not in chosen})


def _complete_ties(model: Any, chosen: dict[str, Choice]) -> None:
    """Of a weight that several modules share the config of a checkpoint names one: where the files have it."""
    ties = Ties(model, float_ties(model))
    for name in list(chosen):
        owner, leaf = find(model, name)
        for other in ties.others(joined(owner, leaf)):
            chosen.setdefault(as_label(other), chosen[name])


def _saved_fit(config: Any, name: str) -> str | None:
    """The fit that goes on finding the scales of a layer in training, by the config; packed weights need none."""
    if not config.qat:
        return None
    values = config.overrides.get(first_match(name, config.overrides) or "", {})
    fit: str | None = config.choice().override(values).fit
    return fit


def was_written_from(model: Any) -> bool:
    """Whether the checkpoint was written from the class of this model, so that everything fits or it is damaged."""
    return type(model).__name__ in (model.config.architectures or [])
