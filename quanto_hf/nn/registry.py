"""Which module type is replaced by which quantized module."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

QMODULES: dict[type[nn.Module], type[nn.Module]] = {}

T = TypeVar("T", bound=type[nn.Module])


def register_qmodule(source: type[nn.Module]) -> Callable[[T], T]:
    """Class decorator: the quantized module of a module type.

    A quantized module has a class method ``from_module`` whose first argument is the module. Subclasses of ``source``
    are not replaced by it: ``nn.MultiheadAttention`` for one has a subclass of Linear that it reads by its weight.
    """

    def register(cls: T) -> T:
        QMODULES[source] = cls
        return cls

    return register


def qmodule_for(module: nn.Module) -> type[nn.Module] | None:
    """The quantized module of exactly this type, or None."""
    return QMODULES.get(type(module))
