"""What int8 and float8 activations are: the rounding of x, and how many of its columns share a scale.

This is the definition that the native kernels are compared with (``cpu/int8.py``). No data is needed: a scale is found
when its numbers pass.
"""

import torch
import torch.nn.functional as F

from quanto_hf.qtypes import QType

# As in the Q8 blocks of llama.cpp: an outlier costs digits in its own 32 columns, where it costs those of a whole token
# otherwise. For int8 weights a scale per token is what makes the product one sum of integers.
ACTIVATION_GROUP = 32
TOKEN = -1


def activation_group(weights: QType, activations: QType) -> int:
    """Columns of x that share a scale, where x is multiplied with such weights; -1 for a whole row of x, a token.

    The one place that decides: int8 activations have a scale per 32 columns for integer weights of 4 and 2 bits, and
    one per token for all others, as float8 activations have for any weight.

    Example:
        >>> from quanto_hf.qtypes import qfloat8, qint4, qint8
        >>> activation_group(qint4, qint8), activation_group(qint8, qint8), activation_group(qint4, qfloat8)
        (32, -1, -1)
    """
    grouped = activations.name == "int8" and weights.kind == "int" and weights.is_packed
    return ACTIVATION_GROUP if grouped else TOKEN


def round_activations(x: torch.Tensor, kind: QType, group: int = TOKEN) -> torch.Tensor:
    """x rounded to the numbers of ``kind`` times a scale, which is absmax over the largest number.

    Args:
        x: float, shape (..., features).
        kind: int8 or an 8-bit float.
        group: columns that share a scale, -1 for all; the last group may be shorter.

    Returns:
        float32, the shape of ``x``. What shares a scale with NaN or infinity is NaN.
    """
    values = x.float()
    features = values.shape[-1]
    if 0 < group < features:
        values = F.pad(values, (0, -features % group)).unflatten(-1, (-1, group))
    scale = values.abs().amax(-1, keepdim=True) / kind.qmax
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    numbers = values / scale
    if kind.float_dtype is None:
        numbers = numbers.round().clamp_(kind.qmin, kind.qmax)
    else:
        numbers = numbers.clamp_(kind.qmin, kind.qmax).to(kind.float_dtype).float()
    rounded = numbers * scale
    return rounded.flatten(-2)[..., :features] if 0 < group < features else rounded
