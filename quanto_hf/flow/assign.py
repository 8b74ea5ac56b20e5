"""Which scheme each slot gets, and why one is left in float."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from quanto_hf.fit import Fit
from quanto_hf.flow.holders import held_parameters
from quanto_hf.flow.leaving import leave_others
from quanto_hf.flow.patterns import any_names, first_match, unmatched
from quanto_hf.nn import why_no_qmodule
from quanto_hf.nn.learned import LearnedScales
from quanto_hf.nn.registry import LOAD, entry_of, slots_of
from quanto_hf.nn.slots import find, joined, label
from quanto_hf.qtypes import QType
from quanto_hf.schemes import Scheme, make_scheme


@dataclass(frozen=True)
class Choice:
    """How one slot is quantized: arguments of :func:`quanto_hf.schemes.make_scheme`, or a scheme; and the fit."""

    weights: str | QType | Scheme
    group_size: int | None = None
    symmetric: bool | None = None
    fit: Fit | str | None = None

    def scheme(self) -> Scheme:
        """The scheme.

        Raises:
            ValueError: the values do not go together.
        """
        if isinstance(self.weights, Scheme):
            return self.weights
        return make_scheme(self.weights, self.group_size, self.symmetric)

    def refusal(self, learn: bool = False) -> str | None:
        """Why no float weight can be quantized so, whatever its shape, in one sentence, or None.

        Args:
            learn: whether its scales are to be trained.
        """
        try:
            scheme = self.scheme()
        except ValueError as error:
            return str(error)
        return scheme.refuses_fit(self.fit) or (scheme.refuses_learning() if learn else None)

    def override(self, values: Mapping[str, Any]) -> "Choice":
        """The same with some values replaced. Another number type starts from its own defaults."""
        if "weights" in values:
            return Choice(**values)
        return Choice(**{**self.__dict__, **values})


# what an override may say
OVERRIDABLE = tuple(field.name for field in fields(Choice))


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
) -> Assignment:
    """Decide for every slot of a model. Changes nothing.

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

    Raises:
        ValueError: the choice or an override cannot be used, whether or not a module gets it.

    Warns:
        UserWarning: a pattern matches no module; the text names near misses.
    """
    exclude, skip, overrides = list(exclude), skip or {}, overrides or {}
    include = None if include is None else list(include)
    check_overrides(overrides)
    if (problem := choice.refusal(learn)) is not None:
        raise ValueError(problem)
    named = dict(model.named_modules())
    entries = {name: entry for name, module in named.items() if (entry := entry_of(module)) is not None}
    slots = {label(name, leaf): name for name, entry in entries.items() for leaf in entry.quantized.slot_names}
    names = list(dict.fromkeys(name for name in (*named, *slots) if name))
    for sentence in unmatched(names, [*exclude, *(include or []), *overrides]):
        warnings.warn(sentence, stacklevel=2)
    asked, shared = [*(include or ()), *asked_by(overrides)], shared_weights(model)
    found = Assignment()
    for name, owner in slots.items():
        module, quantized_class = named[owner], entries[owner].quantized
        if verb not in quantized_class.by_default and not any_names({name, owner}, asked):
            continue
        reason = _reason(name, include, exclude, {**skip, name: skip[owner]} if owner in skip else skip)
        values = overrides.get(first_match(name, overrides) or "", {})
        if reason is None and "weights" in values and values["weights"] is None:
            reason = f"an override leaves {first_match(name, overrides)!r} in float"
        if reason is None and name in shared:
            reason = f"its weight is tied to {shared[name]}"
        if reason is None:
            reason = why_no_qmodule(module)
        if reason is None and learn and not issubclass(quantized_class, LearnedScales):
            reason = f"the scales of {type(module).__name__} modules cannot be learned"
        if reason is None:
            chosen = choice.override(values)
            # first with the name of the module, which says more than the pattern
            if (problem := chosen.refusal(learn)) is not None:
                raise ValueError(f"{name}: {problem}")
            reason = chosen.scheme().refuses(slots_of(module)[find(model, name)[1]].matrix_shape)
        if reason is None:
            found.chosen[name] = chosen
        else:
            found.left[name] = reason
    leave_others(model, found.chosen, found.left, asked)
    for pattern, values in overrides.items():
        # those that no module got
        if values.get("weights", "") is not None and (problem := choice.override(values).refusal(learn)) is not None:
            raise ValueError(f"overrides[{pattern!r}]: {problem}")
    return found


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


def shared_weights(model: nn.Module) -> dict[str, str]:
    """Name of a slot -> full name of another parameter, or of an attribute, that is or holds the same object."""
    first: dict[int, str] = {}
    shared = {}
    # a module with several names comes up once: it shares its weight with nobody
    for owner, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = joined(owner, leaf)
            if id(parameter) in first:
                shared[label(owner, leaf)] = first[id(parameter)]
                shared.setdefault(_label(first[id(parameter)]), name)
            first.setdefault(id(parameter), name)
    for number, place in held_parameters(model).items():
        if number in first:
            shared.setdefault(_label(first[number]), place)
    return shared


def _label(name: str) -> str:
    owner, _, leaf = name.rpartition(".")
    return label(owner, leaf)


def _reason(name: str, include: list[str] | None, exclude: list[str], skip: Mapping[str, str]) -> str | None:
    if name in skip:
        return skip[name]
    if (pattern := first_match(name, exclude)) is not None:
        return f"it matches {pattern!r} of the modules not to convert"
    if include is not None and first_match(name, include) is None:
        return "no pattern of the modules to include matches it"
    return None
