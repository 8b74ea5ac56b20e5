"""What an op is, and how the kernel that runs is chosen.

An op is defined once: a schema, a check of the arguments, a reference in plain torch that is the definition of the
result, and a fake for meta tensors and torch.compile. Kernels register themselves with a sentence-giving predicate;
the first one that has nothing to say against the arguments runs, and the reference serves when all refuse.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from quanto_hf.ops.cpu.library import WRONG_LEVEL
from quanto_hf.ops.watched import traced, untraced

_LIBRARY = torch.library.Library("quanto_hf", "DEF")

OPS: dict[str, "Op"] = {}


def reference_only() -> bool:
    """Whether ``QUANTO_HF_REFERENCE=1`` asks for the reference of every op.

    Raises:
        ValueError: ``QUANTO_HF_CPU`` names no level of this processor. All ways to compute pass here.
    """
    if WRONG_LEVEL is not None:
        raise ValueError(WRONG_LEVEL)
    return os.environ.get("QUANTO_HF_REFERENCE", "0") not in ("", "0")


@dataclass(frozen=True)
class Kernel:
    """One way to run an op. ``refuses(*args)`` returns None, or the sentence why this kernel cannot run."""

    name: str
    run: Callable[..., torch.Tensor]
    refuses: Callable[..., str | None]


@dataclass
class Op:
    """An op with its kernels. Calling it runs the chosen kernel without torch's dispatcher (which costs 6-8 us in
    Python); ``torch_op`` is the same as a torch operator, for torch.compile, export and autograd.

    Args:
        name: its name in ``torch.ops.quanto_hf``.
        schema: arguments and result, as ``torch.library`` writes them.
        check: raises ValueError for arguments that no kernel may see.
        reference: the definition, in plain torch.
        fake: the shape and dtype of the result.
        samples: makes argument tuples for tests, from a seed.
    """

    name: str
    schema: str
    check: Callable[..., None]
    reference: Callable[..., torch.Tensor]
    fake: Callable[..., torch.Tensor]
    samples: Callable[[int], list[tuple[Any, ...]]]
    kernels: list[Kernel] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.name in OPS:
            raise ValueError(f"the op {self.name!r} is defined already")
        _LIBRARY.define(f"{self.name}{self.schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(self.name, self.__call__, "CompositeExplicitAutograd")
        torch.library.register_fake(f"quanto_hf::{self.name}", self.fake, lib=_LIBRARY)
        OPS[self.name] = self

    @property
    def torch_op(self) -> Any:
        """The same as a torch operator."""
        return getattr(torch.ops.quanto_hf, self.name).default

    def kernel(self, name: str, refuses: Callable[..., str | None]) -> Callable[..., Any]:
        """Decorator: register a kernel. Those registered first are asked first."""

        def register(run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            self.kernels.append(Kernel(name, run, refuses))
            return run

        return register

    def backward(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """Register the gradient of ``torch_op``."""
        torch.library.register_autograd(f"quanto_hf::{self.name}", backward, setup_context=setup_context, lib=_LIBRARY)

    def batched(self, rule: Callable[..., tuple[torch.Tensor, int]]) -> None:
        """Register what ``torch_op`` does under torch.func.vmap."""
        torch.library.register_vmap(f"quanto_hf::{self.name}", rule, lib=_LIBRARY)

    def choose(self, *args: Any) -> Callable[..., torch.Tensor]:
        """The function that runs for these arguments."""
        if not reference_only():
            for kernel in self.kernels:
                if kernel.refuses(*args) is None:
                    return kernel.run
        return self.reference

    def __call__(self, *args: Any) -> torch.Tensor:
        if traced():
            # what is recorded is the definition: torch's own operators, which need no copy of this library to run
            with untraced():
                self.check(*args)
            return self.reference(*args)
        self.check(*args)
        return self.choose(*args)(*args)

    def explain(self, *args: Any) -> list[tuple[str, str]]:
        """Each kernel with ``"runs"``, or the sentence why it does not.

        Returns:
            (name, sentence) pairs in the order in which kernels are asked; the reference comes last.
        """
        rows = []
        winner = self.choose(*args)
        for kernel in self.kernels:
            if kernel.run is winner:
                rows.append((kernel.name, "runs"))
            elif reference_only():
                rows.append((kernel.name, "QUANTO_HF_REFERENCE is set"))
            else:
                rows.append((kernel.name, kernel.refuses(*args) or "a kernel before it runs"))
        rows.append(("reference", "runs" if winner is self.reference else "a kernel before it runs"))
        return rows
