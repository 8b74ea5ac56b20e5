"""A model that is run only to look at it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """In eval mode meanwhile; afterwards every module has the mode, and every buffer the values, that it had before.

    Buffers are saved, and written back where an observer, or a batch norm in a part that trains regardless, has changed
    them. They stay the same tensors: prepared calls know where a static scale of the input lies.
    """
    modules = list(model.modules())
    training = [module.training for module in modules]
    saved = [
        (module, name, buffer, buffer.detach().clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.device.type != "meta"
    ]
    try:
        model.eval()
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in saved:
                module._buffers[name] = buffer
                if buffer.shape != values.shape:
                    buffer.set_(values)  # type: ignore[call-overload]
                elif not torch.equal(buffer, values):
                    buffer.copy_(values)
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
