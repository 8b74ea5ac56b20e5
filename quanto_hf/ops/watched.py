"""Whether torch follows the operators of this thread one by one."""

import torch
from torch.autograd import forward_ad

# Looked up once: this is asked in every call of every layer. Names with an underscore have been there since torch 2.1.
_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack
_level = torch._C._functorch.maybe_current_level
_tracer = torch._C._get_tracing_state


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
