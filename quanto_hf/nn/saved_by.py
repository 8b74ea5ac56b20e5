"""Who asks for the state of a quantized layer, and whether it can be read again.

A state dict is only a dict: who asked for it knows what to do with it. But a ``save_pretrained`` writes a folder that a
``from_pretrained`` is to read, and a class that does not know of quantized layers makes float ones then, with random
weights, and says no more than that some names do not fit.
"""

import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

from torch import nn

SAVERS = ("save_pretrained", "_save_pretrained")
# they save adapters and leave the quantized layers alone, or have a quantizer (quanto_hf/hf/save/saving.py), by module
ADAPTERS, TRANSFORMERS = "peft.", "transformers.modeling_utils"
# what a class has that makes its quantized layers itself, in its constructor or from_pretrained
REBUILDS = "quanto_hf_rebuilds"

# called until they return True
_watchers: list[Callable[[], bool]] = []


def when_layers_are_made(act: Callable[[], bool]) -> None:
    """Have ``act`` called whenever a quantized layer is made, until it returns True."""
    _watchers.append(act)


def layer_is_made() -> None:
    """A quantized layer is there, by whatever way."""
    if _watchers:
        _watchers[:] = [act for act in list(_watchers) if not act()]


def knows_quantized(definer: type) -> bool:
    """Whether the ``save_pretrained`` that a class defines is right for quantized layers: it leaves them out, is of a
    model of transformers, which has a quantizer then, or the class says so."""
    modules = [base.__module__ for base in definer.__mro__]
    return bool(getattr(definer, REBUILDS, False)) or any(m == TRANSFORMERS or m.startswith(ADAPTERS) for m in modules)


def refuse_unknown_saver(layer: nn.Module) -> None:
    """Raise an error if the state of a layer is asked for by a ``save_pretrained`` that does not know what it is.

    Raises:
        ValueError: names the class, the layer, and what can be done.
    """
    for owner, definer in _savers():
        if knows_quantized(definer) or getattr(owner, REBUILDS, False):
            return
        name = next((name for name, module in owner.named_modules() if module is layer), None)
        if name is not None:
            raise unknown_saver(owner, [name])


def unknown_saver(owner: nn.Module, names: list[str]) -> ValueError:
    """The error for a model that would save these quantized layers in its own way."""
    cls = type(owner).__name__
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return ValueError(
        f"{cls}.save_pretrained does not know quantized layers, and this model has one in {names[0]!r}{more}: "
        f"{cls}.from_pretrained would make float layers with random weights of what it wrote. Call "
        f"quanto_hf.dequantize(model) to save float weights; or save model.state_dict() and "
        f"quanto_hf.quantization_map(model), and give both to quanto_hf.requantize(new_model, state_dict, map). A "
        f"class that makes its quantized layers itself says so with the attribute {REBUILDS} = True"
    )


def _savers() -> Iterator[tuple[nn.Module, type]]:
    """The models whose ``save_pretrained`` is running, the innermost first, and the class that defines it."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name in SAVERS and code.co_argcount:
            owner = frame.f_locals.get(code.co_varnames[0])
            if isinstance(owner, nn.Module):
                yield owner, _definer(type(owner), code)
        frame = frame.f_back


def _definer(cls: type, code: CodeType) -> type:
    """The class among the bases of ``cls`` that has a method with this code, also inside of a wrapper."""
    for base in cls.__mro__:
        method = vars(base).get(code.co_name)
        while method is not None:
            if getattr(method, "__code__", None) is code:
                return base
            method = getattr(method, "__wrapped__", None)
    return cls
