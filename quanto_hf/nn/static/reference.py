"""Reference modules: the float weight is kept, and rounded in each forward pass."""

from functools import cache
from typing import TypeVar

from torch import nn

T = TypeVar("T", bound=type[nn.Module])


@cache
def as_reference(cls: T) -> T:
    """The class whose modules keep the float weight and give the numbers of ``cls``."""
    return type(cls)(
        f"Reference{cls.__name__}", (cls,), {"is_reference": True, "__doc__": f"A reference {cls.__name__}."}
    )  # type: ignore[return-value]
