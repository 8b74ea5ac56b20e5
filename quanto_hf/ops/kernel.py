"""What a kernel is, and what devices and the environment say about all of them."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from quanto_hf.ops.weight import KINDS

if TYPE_CHECKING:
    from quanto_hf.ops.registry import Op

# What each device says about its kernels, and what the environment asks for that no device can do (one sentence each).
DEVICES: dict[str, Callable[[], dict[str, Any]]] = {}
REFUSED: list[str] = []

Call = Callable[..., "torch.Tensor | None"]


def reference_only() -> bool:
    """Whether ``QUANTO_HF_REFERENCE=1`` asks for the reference of every op.

    Raises:
        ValueError: the environment asks for what a device does not have, such as a level of instructions. All ways to
            compute pass here.
    """
    if REFUSED:
        raise ValueError(REFUSED[0])
    return os.environ.get("QUANTO_HF_REFERENCE", "0") not in ("", "0")


@dataclass(frozen=True)
class Kernel:
    """One way to run an op.

    Args:
        op: the op.
        name: of the kernel, for tables.
        run: computes the result from the arguments of the op.
        supports: returns None for arguments that it can run, or the sentence why not.
        device: type of the device that the weight must be on; None is any.
        kinds: the kinds of weights that it multiplies.
        bind: ``bind(refuses, weight, *rest)`` returns a call for this weight, with everything about it looked up, or
            None. The call takes the other arguments of the op, which are plain tensors on the device, and answers None
            where it does not serve; it asks ``refuses``, which is :meth:`refuses`, before the first call of a kind.
            None: there is nothing to look up.
        label: names it in the warning of a self-check, with what its results depend on, such as a level of
            instructions; None: it is not checked.
    """

    op: "Op"
    name: str
    run: Callable[..., Any]
    supports: Callable[..., str | None]
    device: str | None = None
    kinds: tuple[type, ...] = KINDS
    bind: Callable[..., Call | None] | None = None
    label: Callable[[], str] | None = None

    def refuses(self, *args: Any) -> str | None:
        """None if this kernel can run, and agrees with the reference on this machine; else the sentence why not."""
        op = self.op
        weight = args[op.at]
        if type(weight) not in self.kinds:
            return "it does not know such weights"
        # that all other tensors are where the weight is has been checked
        if self.device is not None and weight.device.type != self.device:
            return f"it runs on {self.device.upper()} only"
        said = self.supports(*args)
        if said is not None or self.label is None:
            return said
        return op.why_wrong(self, op.case(*args))
