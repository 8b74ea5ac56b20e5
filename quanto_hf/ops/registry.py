"""What an op is, and how the kernel that runs is chosen.

An op is defined once: a schema, a check of the arguments, a reference in plain torch that is the definition of the
result, and a fake for meta tensors and torch.compile. Each kernel has a predicate that returns None if it supports the
arguments, else the reason. The first supported kernel runs; otherwise the reference.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from quanto_hf.ops.guard import guarded, is_plain
from quanto_hf.ops.kernel import Call, Kernel, reference_only
from quanto_hf.ops.selfcheck import checked
from quanto_hf.ops.watched import traced, untraced, watched
from quanto_hf.ops.weight import KINDS, PREFIXES, SCHEMAS

_LIBRARY = torch.library.Library("quanto_hf", "DEF")

OPS: dict[str, "Op"] = {}


@dataclass
class Op:
    """An op with its kernels. Calling it runs the chosen kernel without torch's dispatcher (which costs 6-8 us in
    Python); :meth:`in_graph` is the same as a torch operator, for torch.compile, export and autograd.

    One argument is a quantized weight (:mod:`quanto_hf.ops.weight`). Operators of torch take no such values: there is
    one for each kind of weight, with its fields as arguments in place of it.

    Args:
        name: its name in ``torch.ops.quanto_hf``, behind the prefix of the kind of weight.
        schema: arguments and result, as ``torch.library`` writes them, with ``Weight weight`` for the weight.
        check: raises ValueError for arguments that no kernel may see.
        reference: the definition, in plain torch.
        samples: makes argument tuples for tests, from a seed.
        case: the kind of call, for which kernels are checked together: the key of the weight, and more.
        errors: ``errors(run, *case)``: the errors of a kernel on small random arguments of such a case, each with the
            largest one that is allowed.
        title: ``title(*case)`` names the case in a warning.
        fake: the shape and dtype of the result.
        check_bound: raises ValueError for a weight, and what is bound with it, that no kernel may see.
        kinds: the kinds of weights that there are operators for; none where an operator of torch cannot do the same.
    """

    name: str
    schema: str
    check: Callable[..., None]
    reference: Callable[..., Any]
    samples: Callable[[int], list[tuple[Any, ...]]]
    case: Callable[..., tuple[Hashable, ...]]
    errors: Callable[..., list[tuple[float, float]]]
    title: Callable[..., str]
    fake: Callable[..., torch.Tensor] | None = None
    check_bound: Callable[..., None] = lambda weight: weight.check()
    kinds: tuple[Any, ...] = KINDS
    kernels: list[Kernel] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.name in OPS:
            raise ValueError(f"the op {self.name!r} is defined already")
        OPS[self.name] = self
        # which argument is the weight
        before, _, _ = self.schema.partition("Weight weight")
        self.at = before.count(",")
        for kind in self.kinds:
            name = PREFIXES[kind] + self.name
            schema = self.schema.replace("Weight weight", SCHEMAS[kind])
            _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
            _LIBRARY.impl(name, self._of_flat(self.__call__, kind), "CompositeExplicitAutograd")
            assert self.fake is not None
            torch.library.register_fake(f"quanto_hf::{name}", self._of_flat(self.fake, kind), lib=_LIBRARY)

    # --------------------------------------------------------------------------------------- as an operator of torch

    def flat(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of the operator: the weight as its fields."""
        return (*args[: self.at], *args[self.at], *args[self.at + 1 :])

    def of_flat(self, kind: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The inverse of :meth:`flat`."""
        end = self.at + len(kind._fields)
        return (*args[: self.at], kind(*args[self.at : end]), *args[end:])

    def _of_flat(self, run: Callable[..., Any], kind: Any) -> Callable[..., Any]:
        return lambda *args: run(*self.of_flat(kind, args))

    def operator(self, kind: Any) -> Any:
        """The operator of torch for a kind of weight."""
        return getattr(torch.ops.quanto_hf, PREFIXES[kind] + self.name).default

    def in_graph(self, *args: Any) -> Any:
        """The same as one operator of torch."""
        return self.operator(type(args[self.at]))(*self.flat(args))

    def backward(self, backward: Callable[..., tuple[Any, ...]], saved: Callable[..., tuple[Any, ...]]) -> None:
        """Register the gradient of the operators. What is kept for it is packed, never a float weight.

        Args:
            backward: ``backward(needs, weight, grad, *kept)`` returns the gradients of the arguments, with None for the
                weight; ``needs`` says which are wanted.
            saved: ``saved(*args)`` returns the other tensors that ``backward`` needs.
        """
        for kind in self.kinds:
            self._backward(kind, backward, saved)

    def _backward(self, kind: Any, backward: Callable[..., Any], saved: Callable[..., tuple[Any, ...]]) -> None:
        at, count = self.at, len(kind._fields)

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            args = self.of_flat(kind, inputs)
            weight, kept = args[at], saved(*args)
            ctx.has = [arg is not None for arg in args]
            ctx.facts = weight[len(weight.stored) :]
            ctx.kept = len(kept)
            ctx.save_for_backward(*kept, *weight.stored)

        def backward_of_flat(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
            # once: checkpointing computes them anew for each time that they are asked for
            tensors = ctx.saved_tensors
            kept, stored = tensors[: ctx.kept], tensors[ctx.kept :]
            asked = ctx.needs_input_grad
            needs = [*asked[:at], False, *asked[at + count :]]
            needs = [need and has for need, has in zip(needs, ctx.has, strict=True)]
            made = backward(needs, kind(*stored, *ctx.facts), grad, *kept)
            return (*made[:at], *[None] * count, *made[at + 1 :])

        name = f"quanto_hf::{PREFIXES[kind]}{self.name}"
        torch.library.register_autograd(name, backward_of_flat, setup_context=setup_context, lib=_LIBRARY)

    def batched(self) -> None:
        """Register what the operators do under torch.func.vmap: a batch of the first argument is one more dimension of
        it; weights that are batched themselves take turns."""
        for kind in self.kinds:
            torch.library.register_vmap(f"quanto_hf::{PREFIXES[kind]}{self.name}", self._rule(kind), lib=_LIBRARY)

    def _rule(self, kind: Any) -> Callable[..., tuple[torch.Tensor, int]]:
        def rule(info: Any, dims: tuple[int | None, ...], first: Any, *rest: Any) -> tuple[torch.Tensor, int]:
            run = self.operator(kind)
            if dims[0] is not None and not any(dim is not None for dim in dims[1:]):
                return run(first.movedim(dims[0], 0), *rest), 0
            made = []
            for i in range(info.batch_size):
                args = zip((first, *rest), dims, strict=True)
                made.append(run(*(a if dim is None else a.select(dim, i) for a, dim in args)))
            return torch.stack(made), 0

        return rule

    # --------------------------------------------------------------------------------------------------- kernels

    def kernel(
        self, name: str, supports: Callable[..., str | None] = lambda *args: None, *, first: bool = False, **facts: Any
    ) -> Callable[..., Any]:
        """Decorator: register a kernel. Those registered first are asked first.

        Args:
            name: of the kernel.
            supports: returns None for arguments that it can run, or the sentence why not.
            first: ask it before those that are registered already.
            facts: of :class:`Kernel`.
        """

        def register(run: Callable[..., Any]) -> Callable[..., Any]:
            made = Kernel(self, name, run, supports, **facts)
            self.kernels.insert(0 if first else len(self.kernels), made)
            return run

        return register

    def kernels_for(self, weight: Any) -> list[Kernel]:
        """The kernels for weights of this kind."""
        kind = type(weight)
        return [kernel for kernel in self.kernels if kind in kernel.kinds]

    def choose(self, *args: Any) -> Callable[..., Any]:
        """The function that runs for these arguments."""
        if not reference_only():
            for kernel in self.kernels:
                if kernel.refuses(*args) is None:
                    return kernel.run
        return self.reference

    def why_wrong(self, kernel: Kernel, case: tuple[Hashable, ...]) -> str | None:
        """None if the kernel agrees with the reference for such calls, which is tried out once, else the sentence."""
        assert kernel.label is not None
        said: str | None = why_kernel_wrong(kernel.label(), self.name, kernel.run, *case)
        return said

    def __call__(self, *args: Any) -> Any:
        if traced():
            # what is recorded is the definition: torch's own operators, which need no copy of this library to run
            with untraced():
                self.check(*args)
            return self.reference(*args)
        self.check(*args)
        return self.choose(*args)(*args)

    def bind(self, weight: Any, *rest: Any) -> Call | None:
        """A call for one weight with everything about it looked up in advance: 4 us of Python in place of 30.

        Args:
            weight: a quantized weight; its tensors may get other data later, which the call sees.
            rest: arguments of the op that are bound with it; tensors among them may change their values.

        Returns:
            A call that takes the other arguments of the op, and gives what the op gives, to the bit. It answers None
            when it cannot serve: an argument is not what it was made for (another device, a gradient to follow, a view
            that is not contiguous), or the weight has moved. Who called then takes the general way. None if there is
            nothing to look up for this weight.

        Raises:
            ValueError: the weight, or what is bound with it, is not what it must be.
        """
        if type(weight) not in self.kinds:
            return None
        self.check_bound(weight, *rest)
        stored = (*weight.stored, *(arg for arg in rest if isinstance(arg, torch.Tensor)))
        if reference_only() or watched():
            return None
        for kernel in self.kernels_for(weight):
            if kernel.device not in (None, weight.device.type):
                continue
            if kernel.bind is None:
                # it looks at the other arguments of each call
                return None
            if not all(t is None or (t.numel() > 0 and t.device == weight.device and is_plain(t)) for t in stored):
                return None
            call = kernel.bind(kernel.refuses, weight, *rest)
            if call is not None:
                return guarded(call, stored, weight.device.type)
        return None

    def explain(self, *args: Any) -> list[tuple[str, str]]:
        """Each kernel with ``"runs"``, or the sentence why it does not.

        Returns:
            (name, sentence) pairs in the order in which kernels are asked; the reference comes last.
        """
        rows = []
        winner = self.choose(*args)
        for kernel in self.kernels_for(args[self.at]):
            if kernel.run is winner:
                rows.append((kernel.name, "runs"))
            elif reference_only():
                rows.append((kernel.name, "QUANTO_HF_REFERENCE is set"))
            else:
                rows.append((kernel.name, kernel.refuses(*args) or "a kernel before it runs"))
        rows.append(("reference", "runs" if winner is self.reference else "a kernel before it runs"))
        return rows


@checked(lambda label, op, run, *case: f"{label} {OPS[op].title(*case)}")
def why_kernel_wrong(label: str, op: str, run: Callable[..., Any], *case: Hashable) -> list[tuple[float, float]]:
    """The errors of a kernel, each with the largest one that is allowed."""
    return OPS[op].errors(run, *case)
