"""Quantized modules in the places where an assignment wants them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from quanto_hf.flow.assign import Assignment
from quanto_hf.flow.choice import Choice
from quanto_hf.flow.holders import replace_everywhere
from quanto_hf.nn import QuantizedWeight, qmodule_for
from quanto_hf.nn.learned import LearnedScales
from quanto_hf.nn.registry import entry_of
from quanto_hf.nn.slots import WEIGHT, find, note_left
from quanto_hf.nn.subclasses import subclassed
from quanto_hf.qtypes import QType
from quanto_hf.schemes import Scheme


def apply_assignment(
    model: nn.Module,
    assignment: Assignment,
    activations: QType | None = None,
    static: bool = False,
    learn: bool = False,
) -> None:
    """Replace each chosen module by its quantized one in state PREPARED, sharing the parameters. In place.

    A module that is reachable by two names stays one module.

    Args:
        model: the model of the assignment.
        assignment: which modules, and how.
        activations: number type to which their inputs are rounded, or None.
        static: whether these are rounded with one scale that calibration finds.
        learn: whether scales are trained.

    Raises:
        ValueError: a module cannot be quantized so; the text names it, and nothing has been changed.
    """
    made: dict[nn.Module, nn.Module] = {}
    for name, choices in by_module(model, assignment.chosen).items():
        module = model.get_submodule(name)
        try:
            made[module] = layer = quantized_by(module, choices, activations, static)
            if learn:
                assert isinstance(layer, LearnedScales)
                layer.learn_scales()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    replace_modules(model, made)
    note_reasons(model, assignment)


def note_reasons(model: nn.Module, assignment: Assignment) -> None:
    """Let the modules know why slots of them stay float, for the report."""
    for name, reason in assignment.left.items():
        owner, leaf = find(model, name)
        note_left(model.get_submodule(owner), leaf, reason)


def by_module(model: nn.Module, chosen: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Module name -> slot name -> value, from values by names of slots."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in chosen.items():
        owner, leaf = find(model, name)
        found.setdefault(owner, {})[leaf] = value
    return found


def quantized_by(
    module: nn.Module,
    choices: Mapping[str, Choice],
    activations: QType | None = None,
    static: bool = False,
    cls: Any = None,
) -> QuantizedWeight:
    """:func:`quantized`, from slot name -> how it is quantized."""
    schemes = {name: choice.scheme() for name, choice in choices.items()}
    fits = {name: choice.fit for name, choice in choices.items()}
    if set(choices) == {WEIGHT}:
        return quantized(module, schemes[WEIGHT], activations, fits[WEIGHT], static, cls)
    return quantized(module, schemes, activations, fits, static, cls)


def quantized(
    module: nn.Module,
    scheme: Scheme | Mapping[str, Scheme],
    activations: QType | None = None,
    fit: Any = None,
    static: bool = False,
    cls: Any = None,
) -> QuantizedWeight:
    """The quantized module of a float one, in state PREPARED, sharing its parameters.

    Args:
        scheme: how its slots are stored; or slot name -> scheme.
        fit: of its slots; or slot name -> fit.
        cls: the class that stands for its type; None is the registered one.
    """
    found = entry_of(module)
    if cls is not None and found is not None:
        cls = subclassed(cls, found.source, type(module))
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
