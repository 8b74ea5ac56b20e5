"""Where the channels of a module's output go: a forward pass that is watched, operator by operator."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from quanto_hf.flow.batches import tensors_of

# Operators behind which channel c is still channel c of the last dimension, provided that the last dimension keeps its
# size: rearrangements of the other dimensions, casts, and what works on each number alone and is homogeneous
# (f(a x) = a f(x) for a > 0). What is not listed here ends a fold.
ELEMENTWISE = {
    "_to_copy", "_unsafe_view", "abs", "alias", "clone", "detach", "expand", "leaky_relu", "leaky_relu_", "neg", "relu",
    "relu_", "unsqueeze", "view",
}  # fmt: skip
# A product with, and a quotient by, numbers that are no part of the flow.
PRODUCTS = {"mul", "mul_", "div", "div_"}
# What asks a tensor for its shape, dtype and device alone.
SHAPE_ONLY = {
    "empty_like", "full_like", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros", "ones_like",
    "rand_like", "randn_like", "zeros_like",
}  # fmt: skip


@dataclass(eq=False)
class Flow:
    """What happens to the output of one module.

    Args:
        module: a linear layer or a norm.
        channels: size of the last dimension.
        consumers: linear layers of which it is the input.
        reason: why its channels cannot be scaled; empty if they can.
        sample: a part of an input of a norm.
    """

    module: nn.Module
    channels: int
    consumers: set[nn.Linear] = field(default_factory=set)
    reason: str = ""
    sample: torch.Tensor | None = None

    def end(self, reason: str) -> None:
        """Note the first reason against scaling."""
        self.reason = self.reason or reason


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the outputs of linear layers and norms through the operators of a forward pass.

    Tensors are known by their identity, and are not kept alive. The inside of a source is not looked into.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flows: dict[nn.Module, Flow] = {}
        # of each linear layer: which flows its input had, call by call
        self.inputs: dict[nn.Module, list[frozenset[Flow]]] = {}
        self.inside = 0
        self._of: Any = WeakTensorKeyDictionary()

    def of(self, value: Any) -> frozenset[Flow]:
        """The flows that a tensor carries."""
        found: frozenset[Flow] = self._of.get(value, frozenset()) if isinstance(value, torch.Tensor) else frozenset()
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and see what it does to the flows of its inputs."""
        out = func(*args, **(kwargs or {}))
        if not self.inside:
            self._follow(func, args, kwargs or {}, out)
        return out

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        given = [self.of(leaf) for leaf in tree_leaves((args, kwargs))]
        carried = frozenset[Flow]().union(*given)
        name = func._schema.name.split("::")[-1]
        if not carried or name in SHAPE_ONLY:
            return
        # of a quotient, and of what is written in place, only the first tensor may carry a flow
        rest = frozenset[Flow]().union(*given[1:]) if name in ("div", "div_", "mul_") else frozenset()
        for flow in carried:
            if (
                sum(flow in one for one in given) > 1
                or flow in rest
                or not self._keeps(name, func._overloadname, args, out, flow)
            ):
                flow.end(f"its output is also an input of {name}")
        alive = frozenset(flow for flow in carried if not flow.reason)
        if isinstance(out, torch.Tensor):
            self._of[out] = alive

    def _keeps(self, name: str, overload: str, args: Any, out: Any, flow: Flow) -> bool:
        """Whether the channels of the flow are the last dimension of the result."""
        if not isinstance(out, torch.Tensor) or not out.dim() or out.shape[-1] != flow.channels:
            return False
        # div with a rounding mode, and a view of the same bits as another dtype, share their names with harmless ones
        if not out.is_floating_point() or "mode" in overload or overload == "dtype":
            return False
        x = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if name in PRODUCTS:
            return True
        if x is None or x.dim() == 0 or x.shape[-1] != flow.channels:
            return False
        last = x.dim() - 1
        if name in ELEMENTWISE:
            return True
        if name == "transpose":
            return last not in (args[1] % x.dim(), args[2] % x.dim())
        if name == "permute":
            return bool(args[1][-1] % x.dim() == last)
        if name in ("select", "slice", "index_select"):
            return (args[1] if len(args) > 1 else 0) % x.dim() != last
        if name == "squeeze":
            dims = args[1] if len(args) > 1 else []
            return last not in [d % x.dim() for d in (dims if isinstance(dims, list | tuple) else [dims])]
        return name == "index" and len(args[1]) <= last

    # ------------------------------------------------------------------------------------------------ modules

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A source is called: a linear layer takes its input, a norm ends the flow."""
        if not self.inside:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            carried = frozenset[Flow]().union(*map(self.of, tensors))
            if isinstance(module, nn.Linear):
                self.inputs.setdefault(module, []).append(carried)
                for flow in carried:
                    flow.consumers.add(module)
            else:
                for flow in carried:
                    flow.end(f"its output is also an input of a {type(module).__name__}")
        self.inside += 1

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A source has been called: its output is what is followed."""
        self.inside -= 1
        if self.inside or not isinstance(output, torch.Tensor) or not output.dim():
            return
        flow = self.flows.setdefault(module, Flow(module, output.shape[-1]))
        self._of[output] = frozenset([flow])
        if isinstance(module, nn.Linear):
            return
        given = [*args, *kwargs.values()]
        x = given[0] if len(given) == 1 and isinstance(given[0], torch.Tensor) else None
        if x is None or x.shape != output.shape or module.weight.shape != (flow.channels,):
            flow.end(f"it is a {type(module).__name__} that does more than to scale each channel")
        elif flow.sample is None:
            # at most 8 of each dimension: enough to see whether the norm scales as it is told
            part = (slice(0, 8),) * (output.dim() - 1)
            flow.sample = x[part].detach().clone()

    def finish(self, output: Any) -> None:
        """The model has returned: what it gives away is not scaled."""
        for leaf in tensors_of(output):
            for flow in self.of(leaf):
                flow.end("its output is an output of the model")


def is_norm(module: nn.Module) -> bool:
    """Whether a module is without children and has one weight for each channel, as norms are."""
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and weight.dim() == 1
        and set(module._parameters) <= {"weight", "bias"}
        and not any(True for _ in module.children())
    )


@contextmanager
def watching(model: nn.Module) -> Iterator[Watch]:
    """Watch what is called inside: ``watch.finish(output)`` is to be called with the result."""
    watch = Watch()
    with ExitStack() as hooks:
        for module in model.modules():
            if type(module) is nn.Linear or is_norm(module):
                # next to the module itself: what other hooks do to its input and output is looked into
                hooks.enter_context(module.register_forward_pre_hook(watch.enter, with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(watch.leave, with_kwargs=True, prepend=True))
        with watch:
            yield watch
