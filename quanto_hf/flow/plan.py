"""Which scheme each module gets, and why a module is left in float."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from quanto_hf.fit import Fit
from quanto_hf.flow.holders import held_parameters, replace_everywhere
from quanto_hf.flow.patterns import first_match, unmatched
from quanto_hf.nn import QuantizedWeight, qmodule_for, source_of, why_no_qmodule
from quanto_hf.nn.learned import LearnedScales
from quanto_hf.nn.subclasses import subclassed
from quanto_hf.qtypes import QType
from quanto_hf.schemes import Scheme, make_scheme


@dataclass(frozen=True)
class Choice:
    """How the weight of one module is quantized: arguments of :func:`quanto_hf.schemes.make_scheme`, or a scheme; and
    the fit."""

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
class Plan:
    """What :func:`make_plan` decided.

    Args:
        chosen: module name -> how its weight is quantized.
        left: module name -> the reason why it stays float; modules of a type with a quantized counterpart, and of
            subclasses of it.
    """

    chosen: dict[str, Choice] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def make_plan(
    model: nn.Module,
    choice: Choice,
    *,
    types: tuple[type[nn.Module], ...] = (nn.Linear,),
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    skip: Mapping[str, str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    learn: bool = False,
) -> Plan:
    """Decide for every module of a model. Changes nothing.

    Args:
        model: may be on meta.
        choice: what a module gets that no override names.
        types: of the modules to quantize, and of subclasses of them that compute the same.
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
    names = [name for name in named if name]
    for sentence in unmatched(names, [*exclude, *(include or []), *overrides]):
        warnings.warn(sentence, stacklevel=2)
    shared = shared_weights(model)
    plan = Plan()
    for name, module in named.items():
        if source_of(module) not in types:
            continue
        reason = _reason(name, include, exclude, skip)
        values = overrides.get(first_match(name, overrides) or "", {})
        if reason is None and "weights" in values and values["weights"] is None:
            reason = f"an override leaves {first_match(name, overrides)!r} in float"
        if reason is None and name in shared:
            reason = f"its weight is tied to {shared[name]}"
        if reason is None:
            reason = why_no_qmodule(module)
        if reason is None:
            chosen = choice.override(values)
            # first with the name of the module, which says more than the pattern
            if (problem := chosen.refusal(learn)) is not None:
                raise ValueError(f"{name}: {problem}")
            reason = _refusal(chosen, module)
        if reason is None:
            plan.chosen[name] = chosen
        else:
            plan.left[name] = reason
    for pattern, values in overrides.items():
        # those that no module got
        if values.get("weights", "") is not None and (problem := choice.override(values).refusal(learn)) is not None:
            raise ValueError(f"overrides[{pattern!r}]: {problem}")
    return plan


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


def _refusal(choice: Choice, module: nn.Module) -> str | None:
    """Why the weight of a module cannot be stored as wanted, or None."""
    scheme = choice.scheme()
    # the rows of a transposed convolution are not its first dimension: its quantized module knows
    return scheme.refuses(quantized(module, scheme).matrix_shape)


def shared_weights(model: nn.Module) -> dict[str, str]:
    """Module name -> full name of another parameter, or of an attribute, that is or holds the same object as its
    weight."""
    first: dict[int, str] = {}
    shared = {}
    # a module with several names comes up once: it shares its weight with nobody
    for owner, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{owner}.{leaf}" if owner else leaf
            if id(parameter) in first:
                other, _, other_leaf = first[id(parameter)].rpartition(".")
                if leaf == "weight":
                    shared[owner] = first[id(parameter)]
                if other_leaf == "weight":
                    shared.setdefault(other, name)
            first.setdefault(id(parameter), name)
    for number, place in held_parameters(model).items():
        owner, _, leaf = first.get(number, "").rpartition(".")
        if leaf == "weight":
            shared.setdefault(owner, place)
    return shared


def _reason(name: str, include: list[str] | None, exclude: list[str], skip: Mapping[str, str]) -> str | None:
    if name in skip:
        return skip[name]
    if (pattern := first_match(name, exclude)) is not None:
        return f"it matches {pattern!r} of the modules not to convert"
    if include is not None and first_match(name, include) is None:
        return "no pattern of the modules to include matches it"
    return None


def apply_plan(
    model: nn.Module, plan: Plan, activations: QType | None = None, static: bool = False, learn: bool = False
) -> None:
    """Replace each chosen module by its quantized one in state PREPARED, sharing the parameters. In place.

    A module that is reachable by two names stays one module.

    Args:
        model: the model of the plan.
        plan: which modules, and how.
        activations: number type to which their inputs are rounded, or None.
        static: whether these are rounded with one scale that calibration finds.
        learn: whether scales are trained.

    Raises:
        ValueError: a module cannot be quantized so; the text names it, and nothing has been changed.
    """
    made: dict[nn.Module, nn.Module] = {}
    for name, choice in plan.chosen.items():
        module = model.get_submodule(name)
        try:
            made[module] = layer = quantized(module, choice.scheme(), activations, choice.fit, static)
            if learn:
                assert isinstance(layer, LearnedScales)
                layer.learn_scales()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    replace_modules(model, made)
    for name, reason in plan.left.items():
        # read by flow.report
        model.get_submodule(name).quanto_hf_left = reason  # type: ignore[assignment]


def quantized(
    module: nn.Module,
    scheme: Scheme,
    activations: QType | None = None,
    fit: Fit | str | None = None,
    static: bool = False,
    cls: Any = None,
) -> QuantizedWeight:
    """The quantized module of a float one, in state PREPARED, sharing its parameters.

    Args:
        cls: the class that stands for its type; None is the registered one.
    """
    source = source_of(module)
    if cls is not None and source is not None:
        cls = subclassed(cls, source, type(module))
    cls = cls or qmodule_for(module)
    made: QuantizedWeight = cls.from_module(module, scheme, activations, fit, static)
    return made


def replace_modules(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> None:
    """Put each new module wherever its old one is, hooks included: also in lists and other attributes of modules
    (:mod:`quanto_hf.flow.holders`). The model itself cannot be replaced.

    Raises:
        ValueError: the model itself is a key: there is no parent in which it could be replaced.
    """
    if model in made:
        raise ValueError(
            f"the model is a bare {type(model).__name__}, which cannot be replaced in place; "
            f"wrap it: torch.nn.Sequential(model)"
        )
    for old, new in made.items():
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(new, hooks).update(getattr(old, hooks))
        for flags in ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"):
            getattr(new, flags).update(getattr(old, flags))
    for name, module in list(model.named_modules()):
        if module in made and isinstance(made[module], QuantizedWeight):
            made[module].quantized_as = name
    replace_everywhere(model, made)
