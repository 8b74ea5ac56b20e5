"""Fewer cases where two lists are combined whose members do not care for each other."""

from collections.abc import Iterable, Sequence
from typing import Any


def in_turn(first: Iterable[Any], second: Sequence[Any], count: int) -> list[tuple[Any, Any]]:
    """Each of ``first`` with ``count`` of ``second``, where the next one of ``first`` goes on behind them.

    Each of ``second`` comes up where there are ``len(second) / count`` of ``first`` or more.

    Example:
        >>> in_turn("ab", [1, 2, 3], 2)
        [('a', 1), ('a', 2), ('b', 3), ('b', 1)]
    """
    return [(one, second[(count * i + j) % len(second)]) for i, one in enumerate(first) for j in range(count)]
