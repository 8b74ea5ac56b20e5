"""The hooks that call observers, and how hooks move to the module that replaces another."""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import nn

from quanto_hf.eager.fake_quantize import FakeQuantize
from quanto_hf.eager.modules import FloatFunctional
from quanto_hf.eager.qconfig import activation_is_memoryless
from quanto_hf.nn.observers import Observer

OBSERVER = "activation_post_process"
_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


def observe_output(module: nn.Module, input: Any, output: Any) -> Any:
    """Forward hook: the observer sees the output, of several the first, and may round it."""
    observer: Any = module.activation_post_process
    if isinstance(output, torch.Tensor):
        return observer(output)
    if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
        first, rest = observer(output[0]), output[1:]
        return type(output)(first, *rest) if hasattr(output, "_fields") else (first, *rest)
    return output


def observe_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook: the observer sees the first input, and may round it. It may come by its name."""
    observer: Any = module.activation_post_process
    if args:
        return (observer(args[0]), *args[1:]), kwargs
    name = next((name for name in signature(module.forward).parameters if name in kwargs), None)
    return None if name is None else (args, {**kwargs, name: observer(kwargs[name])})


def attach(module: nn.Module, observer: nn.Module) -> None:
    """Give a module an observer: of its input if that has no memory, else of its output. It comes before all hooks that
    the module has."""
    module.add_module(OBSERVER, observer)
    if activation_is_memoryless(module.qconfig):  # type: ignore[arg-type]
        module.register_forward_pre_hook(observe_input, prepend=True, with_kwargs=True)
    else:
        module.register_forward_hook(observe_output, prepend=True)


def detach(module: nn.Module) -> None:
    """Take the observer and its hook away again. The observer inside of a fake quantization is a part of that."""
    found = module._modules.get(OBSERVER)
    if isinstance(module, FakeQuantize) or not (isinstance(found, Observer | FakeQuantize) or _observes(module)):
        return
    if isinstance(module, FloatFunctional):
        module.activation_post_process = nn.Identity()
    else:
        del module._modules[OBSERVER]
    _drop(module, _is_observer)


def _is_observer(hook: Any) -> bool:
    return hook is observe_input or hook is observe_output


def _observes(module: nn.Module) -> bool:
    hooks: list[Any] = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(map(_is_observer, hooks))


def _computes_weight(hook: Any) -> bool:
    # nn.utils.weight_norm and spectral_norm are hooks that set the weight before each forward pass
    return hasattr(hook, "compute_weight")


def compute_weights(module: nn.Module) -> None:
    """Let hooks that compute a weight do it now: one that was set before an optimizer step is old."""
    for hook in module._forward_pre_hooks.values():
        if _computes_weight(hook):
            hook(module, ())


def _stays_behind(hook: Any) -> bool:
    return _is_observer(hook) or _computes_weight(hook)


def _drop(module: nn.Module, which: Callable[[Any], bool]) -> None:
    for table in ("_forward_hooks", "_forward_pre_hooks"):
        hooks = getattr(module, table)
        for key in [key for key, hook in hooks.items() if which(hook)]:
            del hooks[key]
            for flag in _FLAGS:
                getattr(module, flag).pop(key, None)


def saved_hooks(module: nn.Module) -> dict[str, dict[int, Any]]:
    """A copy of all hooks of a module, for :func:`restore_hooks`."""
    return {table: dict(getattr(module, table)) for table in (*_TABLES, *_FLAGS)}


def restore_hooks(module: nn.Module, saved: dict[str, dict[int, Any]]) -> None:
    """Give a module back the hooks that :func:`move_hooks` took, in the tables that their handles know."""
    for table, hooks in saved.items():
        held = getattr(module, table)
        held.clear()
        held.update(hooks)


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let ``new`` have the hooks of ``old``, but for those of observers, in their order and with all that they were
    registered with. Their handles work on ``new``."""
    if old is new:
        return
    _drop(old, _stays_behind)
    for table in (*_TABLES, *_FLAGS):
        own, hooks = dict(getattr(new, table)), getattr(old, table)
        hooks.update(own)
        # the table itself, which is what handles know
        new.__dict__[table] = hooks
    new.__dict__["_is_full_backward_hook"] = old.__dict__.get("_is_full_backward_hook")
