"""What all functions know of a tree of modules: leaves, devices, names."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from quanto_hf.eager.modules import QConfigError

PARAMETRIZATIONS = "parametrizations"


def children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and children, but for what computes parametrized weights. A child with two names comes up twice."""
    skip = PARAMETRIZATIONS if is_parametrized(module) else None
    return ((name, child) for name, child in list(module._modules.items()) if child is not None and name != skip)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module has no children."""
    return next(children(module), None) is None


def has_qconfig(module: nn.Module) -> bool:
    """Whether a module is to be quantized."""
    return getattr(module, "qconfig", None) is not None


def device_of(module: nn.Module, allow_meta: bool = False) -> torch.device | None:
    """The device of a module, or None if it has no tensors.

    Args:
        module: any.
        allow_meta: do not count tensors on meta beside those on one device.

    Raises:
        QConfigError: it is on more than one device.
    """
    tensors: list[Any] = [*module.parameters(), *module.buffers()]
    devices = {tensor.device for tensor in tensors}
    if allow_meta and len(devices) > 1:
        devices.discard(torch.device("meta"))
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise QConfigError(f"{type(module).__name__} is on more than one device ({names}); move it to one first")
    return next(iter(devices), None)
