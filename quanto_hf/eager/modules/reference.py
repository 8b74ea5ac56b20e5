"""Reference modules: the float weight is kept, and rounded in each forward pass."""

from typing import Any

_MADE: dict[type[Any], type[Any]] = {}


def as_reference(cls: type[Any]) -> type[Any]:
    """The class whose modules keep the float weight and give the numbers of ``cls``.

    Args:
        cls: a class that has ``is_reference``.
    """
    if cls not in _MADE:
        text = f"A {cls.__name__} that keeps its float weight."
        _MADE[cls] = type(f"Reference{cls.__name__}", (cls,), {"is_reference": True, "__doc__": text})
    return _MADE[cls]
