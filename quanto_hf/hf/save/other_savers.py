"""Classes outside of transformers that save themselves: an error before they write what they cannot read.

A component of diffusers, a model with huggingface_hub's mixin, a module of one's own with a ``save_pretrained``: none
of them asks a quantizer of ours. Layers notice that too (``quanto_hf/nn/saved_by.py``), but only when their state is
asked for, and by then a config has been written.
"""

import functools
import weakref
from typing import Any

from torch import nn

from quanto_hf.nn import QuantizedWeight
from quanto_hf.nn.saved_by import REBUILDS, knows_quantized, unknown_saver

# sentence-transformers has both, of which the second one writes
NAMES = ("save_pretrained", "save")

_seen: weakref.WeakSet[type] = weakref.WeakSet()


def watch_other_savers() -> None:
    """Let every ``save_pretrained`` of a torch module that exists now look at what it saves."""
    todo: list[type] = [nn.Module]
    while todo:
        cls = todo.pop()
        todo += type.__subclasses__(cls)
        if cls in _seen:
            continue
        _seen.add(cls)
        for definer in cls.__mro__:
            if "save_pretrained" in vars(definer) and not knows_quantized(definer):
                _watch(definer)


def _watch(cls: type) -> None:
    for name in NAMES:
        save: Any = vars(cls).get(name)
        if callable(save) and not isinstance(save, type) and not getattr(save, "watched_by_quanto_hf", False):
            setattr(cls, name, _checked(save, cls))


def _checked(save: Any, cls: type) -> Any:
    @functools.wraps(save)
    def checked(model: Any, *args: Any, **kwargs: Any) -> Any:
        # a mixin may be of something else
        if isinstance(model, nn.Module):
            refuse(model, cls)
        return save(model, *args, **kwargs)

    checked.watched_by_quanto_hf = True  # type: ignore[attr-defined]
    return checked


def refuse(model: nn.Module, definer: type) -> None:
    """Raise an error for a model that saves itself and has quantized layers which are not inside of a model of
    transformers, which may be saved on its own.

    Args:
        model: the one that is saved.
        definer: the class that has the method.

    Raises:
        ValueError: names the class, the first layer, and what can be done.
    """
    if knows_quantized(definer) or getattr(model, REBUILDS, False):
        return
    inside = [name for name, module in model.named_modules() if name and knows_quantized(type(module))]
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, QuantizedWeight) and not any(name.startswith(f"{part}.") for part in inside)
    ]
    if names:
        raise unknown_saver(model, names)
