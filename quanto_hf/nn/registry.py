"""Which module type is replaced by which quantized module."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from quanto_hf.nn.subclasses import subclassed, why_not_equivalent

QMODULES: dict[type[nn.Module], type[nn.Module]] = {}

T = TypeVar("T", bound=type[nn.Module])


def register_qmodule(source: type[nn.Module]) -> Callable[[T], T]:
    """Class decorator: the quantized module of a module type.

    A quantized module has a class method ``from_module`` whose first argument is the module. A subclass of ``source``
    is replaced by a subclass of it, if it computes the same (:func:`quanto_hf.nn.subclasses.why_not_equivalent`).
    """

    def register(cls: T) -> T:
        QMODULES[source] = cls
        return cls

    return register


def source_of(module: nn.Module) -> type[nn.Module] | None:
    """The type with a quantized module that a module is of, or of a subclass of; None for one that is quantized."""
    if type(module) in QMODULES:
        return type(module)
    bases = type(module).__mro__
    if any(cls in bases for cls in QMODULES.values()):
        return None
    return next((base for base in bases if base in QMODULES), None)


def why_no_qmodule(module: nn.Module) -> str | None:
    """Why a module of a type with a quantized module has none itself, or None."""
    source = source_of(module)
    return None if source is None else why_not_equivalent(module, source)


def qmodule_for(module: nn.Module) -> type[nn.Module] | None:
    """The quantized module of a module, or None.

    Example:
        >>> class Mine(nn.Linear):
        ...     def forward(self, input):
        ...         return input @ self.weight.T + self.bias
        >>> made = qmodule_for(Mine(4, 4))
        >>> made.__name__, issubclass(made, Mine), issubclass(made, QMODULES[nn.Linear])
        ('QMine', True, True)
    """
    if type(module) in QMODULES:
        return QMODULES[type(module)]
    source = source_of(module)
    if source is None or why_not_equivalent(module, source) is not None:
        return None
    return subclassed(QMODULES[source], source, type(module))
