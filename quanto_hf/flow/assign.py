"""Which scheme each slot gets, and why one is left in float."""

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from quanto_hf.flow.choice import OVERRIDABLE, Choice
from quanto_hf.flow.leaving import leave_others
from quanto_hf.flow.patterns import any_names, first_match, matches, unmatched
from quanto_hf.flow.ties import Ties, why_not_one
from quanto_hf.nn import why_no_qmodule
from quanto_hf.nn.learned import LearnedScales
from quanto_hf.nn.qembedding import QuantizedTable
from quanto_hf.nn.registry import LOAD, entry_of, slots_of
from quanto_hf.nn.slots import find, joined, label


@dataclass
class Assignment:
    """What :func:`assign` decided.

    Args:
        chosen: name of a slot -> how it is quantized. A slot is named as patterns name it
            (:func:`quanto_hf.nn.slots.label`): a ``weight`` by its module.
        left: name of a slot -> the reason why it stays float, of all that would be quantized if nothing spoke against
            it.
    """

    chosen: dict[str, Choice] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def assign(
    model: nn.Module,
    choice: Choice,
    *,
    verb: str = LOAD,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    skip: Mapping[str, str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    learn: bool = False,
    embeddings: Choice | None = None,
    outputs: Collection[str] = (),
    ties: Mapping[str, str] | None = None,
) -> Assignment:
    """Decide for every slot of a model. Changes nothing.

    Slots with one weight (:class:`quanto_hf.flow.ties.Ties`) get one scheme, and stay float if one of them does. An
    embedding and what is tied to it stay float unless ``embeddings`` is given or a pattern names one of them.

    Args:
        model: may be on meta.
        choice: what a module gets that no override names.
        verb: ``quanto_hf.nn.registry.LOAD`` or ``QUANTIZE``: takes the types that are registered for it. One of another
            type is taken if a pattern of ``include``, or of an override that quantizes, names it itself, and not only a
            module that contains it.
        include: patterns; only modules that match one are quantized. None means all.
        exclude: patterns of modules that stay float.
        skip: exact module name -> reason, for modules that stay float by default.
        overrides: pattern -> values that replace those of ``choice``; the first pattern that matches counts. The
            value of ``weights`` may be None: leave these modules in float.
        learn: whether scales are to be trained.
        embeddings: what embeddings and output heads get; None is for those that are named what all get, and float for
            others. Values of overrides replace it where the pattern names the embedding or head itself.
        outputs: names of the output heads.
        ties: full name of a parameter -> the one that it will be tied to, besides those that are one object.

    Raises:
        ValueError: the choice or an override cannot be used, whether or not a module gets it; or overrides name two
            schemes for one weight.

    Warns:
        UserWarning: a pattern matches no module; the text names near misses.
    """
    exclude, skip, overrides = list(exclude), skip or {}, overrides or {}
    include = None if include is None else list(include)
    check_overrides(overrides)
    for given in (choice, embeddings):
        if given is not None and (problem := given.refusal(learn)) is not None:
            raise ValueError(problem)
    named = dict(model.named_modules())
    entries = {name: entry for name, module in named.items() if (entry := entry_of(module)) is not None}
    slots = {label(name, leaf): (name, leaf) for name, entry in entries.items() for leaf in entry.quantized.slot_names}
    names = list(dict.fromkeys(name for name in (*named, *slots) if name))
    for sentence in unmatched(names, [*exclude, *(include or []), *overrides]):
        warnings.warn(sentence, stacklevel=2)
    asked, tied = [*(include or ()), *asked_by(overrides)], Ties(model, ties)
    found, groups = Assignment(), dict[str, dict[str, _Slot]]()
    for name, (owner, leaf) in slots.items():
        full, cls = joined(owner, leaf), entries[owner].quantized
        special = embeddings is not None and (issubclass(cls, QuantizedTable) or owner in outputs)
        explicit = any_names({name, owner}, asked)
        others = tied.others(full)
        if verb not in cls.by_default and not explicit and not special and not others:
            continue
        values = _values({name, owner}, name, overrides, special)
        reason = _reason(name, include, exclude, {**skip, name: skip[owner]} if owner in skip else skip)
        if reason is None and "weights" in values and values["weights"] is None:
            reason = f"an override leaves {first_match(name, overrides)!r} in float"
        if reason is None and (place := tied.held_by(full)) is not None:
            reason = f"its weight is tied to {place}"
        if reason is None:
            reason = why_no_qmodule(named[owner])
        if reason is None and learn and not issubclass(cls, LearnedScales):
            reason = f"the scales of {type(named[owner]).__name__} modules cannot be learned"
        if reason is None and learn and others:
            reason = f"its weight is tied to {others[0]}: the scales of a tied weight cannot be learned"
        slot = _Slot(full, (embeddings if special and embeddings else choice).override(values), reason, explicit)
        slot.wanted = explicit or special
        slot.by_default, slot.made_float = verb in cls.by_default, values.get("weights", "") is None
        groups.setdefault(tied.group(full)[0], {})[name] = slot
    for members in groups.values():
        _decide(model, tied, members, found, learn)
    leave_others(model, found.chosen, found.left, asked)
    for pattern, values in overrides.items():
        # those that no module got
        if values.get("weights", "") is not None and (problem := choice.override(values).refusal(learn)) is not None:
            raise ValueError(f"overrides[{pattern!r}]: {problem}")
    return found


@dataclass
class _Slot:
    """What speaks for and against quantizing a slot: the full name of its parameter, what it would get, why it stays
    float, whether a pattern names it, whether it is quantized if nothing speaks against it, alone or by its type, and
    whether an override leaves it in float."""

    full: str
    choice: Choice
    reason: str | None
    explicit: bool
    wanted: bool = False
    by_default: bool = True
    made_float: bool = False


def _decide(model: nn.Module, tied: Ties, members: Mapping[str, _Slot], found: Assignment, learn: bool) -> None:
    """Take up the slots of one weight, all or none of them.

    Raises:
        ValueError: the choice cannot be used, or there are two.
    """
    group = tied.group(next(iter(members.values())).full)
    if len(group) > 1:
        choice = _one_choice(members)
        reason = _why_left(model, group, members)
    else:
        (slot,) = members.values()
        choice, reason = slot.choice, slot.reason
    for name, slot in members.items():
        own = slot.reason or reason
        if own is None:
            # first with the name of the module, which says more than the pattern
            if (problem := choice.refusal(learn)) is not None:
                raise ValueError(f"{name}: {problem}")
            owner, leaf = find(model, name)
            own = choice.scheme().refuses(slots_of(model.get_submodule(owner))[leaf].matrix_shape)
        if own is None:
            found.chosen[name] = choice
        elif slot.by_default or slot.wanted:
            found.left[name] = own


def _one_choice(members: Mapping[str, _Slot]) -> Choice:
    """What the slots of one weight get: what is asked for by name, else what an embedding or head gets, else any."""
    explicit = {name: slot.choice for name, slot in members.items() if slot.explicit and slot.reason is None}
    said = {name: f"{choice.scheme()}" + f", fit {choice.fit}" * bool(choice.fit) for name, choice in explicit.items()}
    if explicit:
        said.update({name: "float" for name, slot in members.items() if slot.made_float})
    if len(set(said.values())) > 1:
        texts = " and ".join(f"{name!r} is to be {text}" for name, text in said.items())
        raise ValueError(
            f"overrides ask for two ways to store one weight: {texts}, but they are tied; give one of them"
        )
    wanted = [slot.choice for slot in members.values() if slot.wanted]
    return next(iter([*explicit.values(), *wanted, *(slot.choice for slot in members.values())]))


def _why_left(model: nn.Module, group: list[str], members: Mapping[str, _Slot]) -> str | None:
    """Why a weight that several slots share stays float, or None."""
    alike = len(members) == len(group) and all(slot.by_default for slot in members.values())
    if not alike and not any(slot.wanted for slot in members.values()):
        # the first of the others, for each of them
        for slot in members.values():
            slot.reason = slot.reason or f"its weight is tied to {next(n for n in group if n != slot.full)}"
        return None
    for slot in members.values():
        if slot.reason is not None:
            return f"its weight is tied to {slot.full}, which stays float: {slot.reason}"
    missing = next((full for full in group if full not in {slot.full for slot in members.values()}), None)
    if missing is not None:
        return f"its weight is tied to {missing}, which is of no type that is quantized"
    problem = why_not_one(model, group)
    return None if problem is None else f"its weight is tied to others, which cannot share a packed one: {problem}"


def _values(
    names: Collection[str], name: str, overrides: Mapping[str, Mapping[str, Any]], special: bool
) -> Mapping[str, Any]:
    """The values of the first override that counts for a slot.

    Args:
        special: whether it is an embedding or head with a choice of its own, of which only patterns that name it
            change that; those that leave in float count as ever.
    """
    for pattern, values in overrides.items():
        if not matches(name, pattern):
            continue
        if not special or any_names(names, [pattern]) or values.get("weights", "") is None:
            return values
    return {}


def check_overrides(overrides: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError for overrides that are not patterns with known values."""
    for pattern, values in overrides.items():
        if not isinstance(values, Mapping):
            raise ValueError(f"overrides[{pattern!r}]={values!r}; give a dict such as {{'weights': 'int8'}}")
        if unknown := sorted(set(values) - set(OVERRIDABLE)):
            raise ValueError(
                f"overrides[{pattern!r}]: {', '.join(map(repr, unknown))} is not known; choose {', '.join(OVERRIDABLE)}"
            )


def asked_by(overrides: Mapping[str, Mapping[str, Any]] | None) -> list[str]:
    """The patterns of overrides that quantize, and do not leave modules in float."""
    check_overrides(overrides or {})
    return [pattern for pattern, values in (overrides or {}).items() if values.get("weights", "") is not None]


def _reason(name: str, include: list[str] | None, exclude: list[str], skip: Mapping[str, str]) -> str | None:
    if name in skip:
        return skip[name]
    if (pattern := first_match(name, exclude)) is not None:
        return f"it matches {pattern!r} of the modules not to convert"
    if include is not None and first_match(name, include) is None:
        return "no pattern of the modules to include matches it"
    return None
