"""Observers that do nothing."""

from typing import Any

from quanto_hf.nn.observers.base import Observer, register


@register("noop")
class NoopObserver(Observer):
    """Records nothing, and has no scale.

    Args:
        dtype: number type.
        custom_op_name: kept, not used.
    """

    def __init__(self, dtype: Any = "float16", custom_op_name: str = "") -> None:
        super().__init__(dtype)
        self.custom_op = custom_op_name


@register("reuse_input")
class ReuseInputObserver(Observer):
    """For operations such as reshape, whose output has the scale of the input. Records nothing."""

    def __init__(self) -> None:
        super().__init__("quint8")
