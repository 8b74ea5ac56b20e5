"""Whether torch follows the operators of this thread one by one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import forward_ad

# Looked up once: this is asked in every call of every layer. Names with an underscore have been there since torch 2.1.
_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack
_level = torch._C._functorch.maybe_current_level
_tracer = torch._C._get_tracing_state
_set_tracer: Any = torch._C._set_tracing_state  # type: ignore[attr-defined]
_mode = torch._C._get_dispatch_mode
_FAKE, _PROXY = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY


def watched() -> bool:
    """True inside FakeTensorMode, make_fx and other dispatch modes, torch.func's transforms, forward-mode gradients and
    torch.jit.trace. What is computed behind torch's back is invisible to them: a trace without the product, a tangent
    that is lost. Memory that outlives the call must not be used either.
    """
    return bool(_modes()) or _transform() is not None or forward_ad._current_level >= 0 or _tracer() is not None


def transformed() -> bool:
    """True inside a transform of torch.func, which cannot follow a gradient that is registered for an operator. A
    graph of torch.compile holds it for False, and one of a transform cannot hold it, and breaks here."""
    return _level() is not None


def dispatched() -> bool:
    """True inside FakeTensorMode, make_fx and other dispatch modes, which see an op of ``torch.library`` as one."""
    return bool(_modes())


def wants_grad(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a product with x and a bias has to be an operator of torch, which has a gradient. In a trace it is made
    of torch's own operators, which have theirs."""
    if not torch.is_grad_enabled() or traced():
        return False
    return x.requires_grad or (bias is not None and bias.requires_grad)


def traced() -> bool:
    """True inside torch.jit.trace. What is recorded there has to be right for inputs of other shapes, and must not
    depend on whether gradients are wanted: ``check_trace`` records twice, the second time without them."""
    return _tracer() is not None


def recording() -> bool:
    """True where a graph is made of what is called: under torch.compile and export, and inside torch.jit.trace."""
    # not traced(): each layer of each token asks, and a call costs as much as what it looks up
    return torch.compiler.is_compiling() or _tracer() is not None


def faked() -> bool:
    """True in make_fx and for fake tensors, where values cannot be looked at."""
    return _mode(_FAKE) is not None or _mode(_PROXY) is not None


def as_a_node() -> bool:
    """True where what looks at values has to be one operator: in graphs, in make_fx and for fake tensors. Other
    dispatch modes, such as one that counts operations, see what it does."""
    return recording() or faked()


@contextmanager
def untraced() -> Iterator[None]:
    """Nothing in here is recorded by torch.jit.trace: for looking at values, and for constants."""
    state = _tracer()
    if state is None:
        yield
        return
    _set_tracer(None)
    try:
        yield
    finally:
        _set_tracer(state)


def sizes(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of a tensor as integers. In a trace ``tensor.shape`` has tensors in their place, which are recorded and
    cannot be counted with; these become constants, so they have to be those of every input."""
    with untraced():
        return tuple(tensor.shape)
