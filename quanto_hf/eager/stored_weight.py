"""The float weight of stored tensors in a state dict, which does not name its scheme."""

from collections.abc import Mapping

import torch

from quanto_hf.ops import GroupedWeight, dequantize, groups, packed_width
from quanto_hf.schemes import GROUP_SIZES, PER_CHANNEL


def dequantized(prefix: str, state: Mapping[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """The weight that ``<prefix>weight_packed``, ``_scale`` and ``_zero`` stand for.

    Args:
        prefix: name of the module, with a dot.
        state: a state dict.
        weight: the float weight, for its shape and dtype.

    Raises:
        ValueError: it cannot be known from shapes and dtypes alone.
    """
    packed, scale = state[f"{prefix}weight_packed"], state[f"{prefix}weight_scale"]
    zero = state.get(f"{prefix}weight_zero")
    fits: list[torch.Tensor] = []
    for order in (weight, weight.transpose(0, 1)) if weight.dim() > 2 else (weight,):
        # a transposed convolution has its output channels second, and stores them first
        columns = order.numel() // max(order.shape[0], 1)
        kind, size = _kind(packed, zero, columns), _group_size(scale.shape[-1], columns)
        if kind is not None and size is not None and packed.shape[0] == order.shape[0]:
            made = dequantize(GroupedWeight(packed, scale, zero, kind, size, columns), weight.dtype).view(order.shape)
            fits.append(made if order is weight else made.transpose(0, 1))
    if not fits:
        raise ValueError(
            f"{prefix}weight_packed does not say what type of number it holds, or its shape is not that of the float "
            f"weight; give the quantized model instead of its state dict"
        )
    # where both orders have the same shape, the right one is close to the float weight
    return min(fits, key=lambda made: float((made - weight).square().sum()))


def _group_size(count: int, columns: int) -> int | None:
    if count == 1:
        return PER_CHANNEL
    return next((size for size in GROUP_SIZES if groups(columns, size) == count), None)


def _kind(packed: torch.Tensor, zero: torch.Tensor | None, columns: int) -> str | None:
    """The number type, or None if several have such tensors."""
    if packed.dtype is torch.int8:
        return "int8"
    bits = [b for b in (8, 4, 2) if packed_width(columns, b) == packed.shape[-1]]
    if bits == [2]:
        return "int2"
    return "int4" if bits == [4] and zero is not None else None
