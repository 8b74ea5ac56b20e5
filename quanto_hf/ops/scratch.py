"""One reused buffer per thread, device and dtype, for weights that are dequantized a block of rows at a time.

Fresh temporaries of some MB each fragment the heap of glibc: loading a 776 MB model then peaked at 710-797 MB instead
of 396 MB. One buffer also stays in the L2 cache.
"""

import ctypes
import threading
from functools import cache
from typing import Any

import torch

from quanto_hf.ops.watched import watched

_local = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A contiguous tensor of the wanted shape with undefined contents.

    It is valid until the same thread asks for the same name, dtype and device again: never return it, or a view of
    it, to a caller.
    """
    if watched():  # a tensor that a mode or a transform made is of use to nobody else
        return torch.empty(shape, dtype=dtype, device=device)
    buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = _local.__dict__.setdefault("buffers", {})
    numel = 1
    for size in shape:
        numel *= size
    key = (name, dtype, device)
    buffer = buffers.get(key)
    if buffer is None or buffer.numel() < numel:
        # an ordinary tensor even under inference_mode: it may be used outside of it later
        with torch.inference_mode(False):
            buffer = buffers[key] = torch.empty(numel, dtype=dtype, device=device)
    return buffer[:numel].view(shape)


def free() -> None:
    """Give this thread's buffers back."""
    _local.__dict__.pop("buffers", None)


def give_back() -> None:
    """Give memory that was freed back to the system where the C library keeps it. glibc puts temporaries of up to 32 MB
    into its heap, between results that stay: up to 180 MB of holes while the experts of a 760 MB model were quantized,
    and 7 MB with this (1 ms)."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        # another C library
        return None
