"""A model that is run only to look at it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """In eval mode meanwhile; afterwards every module has the mode, and every buffer the values, that it had before.

    Buffers are copied: an observer, or a batch norm in a part that trains regardless, writes into the copy.
    """
    modules = list(model.modules())
    training = [module.training for module in modules]
    buffers = [(module, name, buffer) for module in modules for name, buffer in module._buffers.items()]
    try:
        copies = {id(buffer): buffer.clone() for _, _, buffer in buffers if buffer is not None}
        for module, name, buffer in buffers:
            if buffer is not None:
                module._buffers[name] = copies[id(buffer)]
        model.eval()
        yield
    finally:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
