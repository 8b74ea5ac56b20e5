"""Which module type is replaced by which quantized class, and in which verbs without being named."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from quanto_hf.nn.slots import Slot
from quanto_hf.nn.subclasses import subclassed, why_not_equivalent

# Exact float type -> quantized class.
QMODULES: dict[type[nn.Module], type[nn.Module]] = {}

# The verbs that quantize a registered type where no pattern names the module: from_pretrained, and quantize().
LOAD, QUANTIZE = "load", "quantize"

T = TypeVar("T", bound=type[nn.Module])
Source = type[nn.Module] | str | Callable[[nn.Module], bool]


@dataclass(frozen=True)
class Found:
    """The entry of the registry that a float module belongs to.

    Args:
        quantized: the class that was registered.
        source: the float type that it was registered for, or the module's own type if that was a predicate.
    """

    quantized: Any
    source: type[nn.Module]


# Class path or predicate -> quantized class, in the order in which they are asked.
_OTHERS: list[tuple[str | Callable[[nn.Module], bool], type[nn.Module]]] = []


def register_qmodule(source: Source, by_default: Iterable[str] = ()) -> Callable[[T], T]:
    """Class decorator: the quantized class of a kind of float modules. The first entry that a module fits counts.

    A subclass of a registered type is replaced as well if it computes the same
    (:func:`quanto_hf.nn.subclasses.why_not_equivalent`).

    Args:
        source: a module type; the path of one such as ``"transformers.pytorch_utils.Conv1D"``, which is not imported;
            or a predicate over modules. Where the decorated class does not derive from the module's own, the quantized
            class is made of both.
        by_default: the verbs, of ``LOAD`` and ``QUANTIZE``, that quantize these modules where no pattern names them.
    """

    def register(cls: T) -> T:
        made: Any = cls
        made.by_default = frozenset(by_default)
        if isinstance(source, type):
            made.stands_for = source
            QMODULES[source] = cls
        else:
            _OTHERS.append((source, cls))
        return cls

    return register


def entry_of(module: nn.Module) -> Found | None:
    """The entry of a float module, or None: there is none, or the module is a quantized one."""
    if (exact := QMODULES.get(type(module))) is not None:
        return Found(exact, type(module))
    bases = type(module).__mro__
    if any(cls in bases for cls in (*QMODULES.values(), *(cls for _, cls in _OTHERS))):
        return None
    if (base := next((base for base in bases if base in QMODULES), None)) is not None:
        return Found(QMODULES[base], base)
    for source, cls in _OTHERS:
        if isinstance(source, str):
            named = (base for base in bases if f"{base.__module__}.{base.__qualname__}" == source)
            if (base := next(named, None)) is not None:
                return Found(cls, base)
        elif source(module):
            return Found(cls, type(module))
    return None


def slots_of(module: nn.Module) -> dict[str, Slot]:
    """Slot name -> slot, of a module of a registered type, float or quantized; empty for any other.

    Example:
        >>> slots_of(nn.Linear(4, 2))["weight"].matrix_shape
        (2, 4)
    """
    if (found := entry_of(module)) is not None:
        return {slot.name: slot.of(getattr(module, slot.name).shape) for slot in found.quantized.declared}
    return {slot.name: slot for slot in getattr(module, "slots", ()) if isinstance(slot, Slot)}


def source_of(module: nn.Module) -> type[nn.Module] | None:
    """The type with a quantized class that a module is of, or of a subclass of; None for one that is quantized."""
    found = entry_of(module)
    return None if found is None else found.source


def why_no_qmodule(module: nn.Module) -> str | None:
    """Why a module of a type with a quantized class has none itself, or None."""
    found = entry_of(module)
    if found is None:
        return None
    cls = found.quantized
    return why_not_equivalent(module, found.source, cls.slot_names, cls.keeps_forward) or cls.refuses_module(module)


def qmodule_for(module: nn.Module) -> Any:
    """The quantized class of a module, or None.

    Example:
        >>> class Mine(nn.Linear):
        ...     def forward(self, input):
        ...         return input @ self.weight.T + self.bias
        >>> made = qmodule_for(Mine(4, 4))
        >>> made.__name__, issubclass(made, Mine), issubclass(made, QMODULES[nn.Linear])
        ('QMine', True, True)
    """
    kind = type(module)
    if kind in QMODULES:
        return subclassed(QMODULES[kind], kind, kind)
    found = entry_of(module)
    if found is None or why_no_qmodule(module) is not None:
        return None
    return subclassed(found.quantized, found.source, kind)
