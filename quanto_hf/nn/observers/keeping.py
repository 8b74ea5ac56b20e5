"""Scales and ranges move with their model and keep their dtype."""

from collections.abc import Callable

import torch
from torch import nn


class KeepsDtypes(nn.Module):
    """A module that moves with its model, and whose tensors keep their dtype: in bfloat16 a range would have 8 bits.

    Example:
        >>> module = KeepsDtypes()
        >>> module.register_buffer("scale", torch.ones(1))
        >>> module.bfloat16().scale.dtype
        torch.float32
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "KeepsDtypes":
        def guarded(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(guarded, recurse)  # type: ignore[no-untyped-call]
        return self
