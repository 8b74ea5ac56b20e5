"""Families that need something of their own, and why. Everything else is found out (:mod:`.shrink`, :mod:`.inputs`)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .shrink import Step


@dataclass(frozen=True)
class Care:
    """What one family needs.

    Args:
        cls: name of the model class, where another one than usual runs alone.
        config: arguments of the published config, where the class has none that can be built.
        tiny: values of the tiny config; a dict changes a part of it.
        inputs: arguments of the forward pass, by the tiny config.
        steps: sizes to try; empty is all.
        left: why the family is left out; empty if it is not.
        why: the reason for the rest.
    """

    cls: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    tiny: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[Any], dict[str, Any]] | None = None
    steps: tuple[Step, ...] = ()
    left: str = ""
    why: str = ""


CARE: dict[str, Care] = {}
