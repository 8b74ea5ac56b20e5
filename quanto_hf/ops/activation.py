"""What int8 and float8 activations are: the rounding of x, and how many of its columns share a scale.

This is the definition that the native kernels are compared with (``cpu/csrc/int8*.h``). No data is needed: a scale is
found when its numbers pass, unless one is given that was found before (static activations).
"""

import torch
import torch.nn.functional as F

from quanto_hf.ops.watched import sizes
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


def check_scale(scale: torch.Tensor) -> None:
    """That ``scale`` can be the scale of all of x.

    Raises:
        ValueError: it is not one float32 number.
    """
    if sizes(scale).count(1) != scale.dim() or scale.dtype is not torch.float32:
        raise ValueError(
            f"a scale of activations is one float32 number, not shape {tuple(scale.shape)} and {scale.dtype}; "
            "reduce it to one, as absmax / 127 of what passed, and convert it"
        )


def round_activations(
    x: torch.Tensor, kind: QType, group: int = TOKEN, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """x rounded to the numbers of ``kind`` times a scale: the given one, or absmax over the largest number.

    Halves go to even numbers, and what is beyond the largest number becomes that number: 127 for int8, whose smallest
    is -127. A scale of 0 counts as 1.

    Args:
        x: float, shape (..., features).
        kind: int8 or an 8-bit float.
        group: columns that share a scale, -1 for all; the last group may be shorter.
        scale: the scale of all of x, one float32 number; ``group`` does not matter then.

    Returns:
        float32, the shape of ``x``. NaN stays NaN. Infinity becomes the largest number of a given scale; without one,
        what shares a scale with NaN or infinity is NaN.

    Raises:
        ValueError: ``scale`` is not one float32 number.

    Example:
        >>> from quanto_hf.qtypes import qint8
        >>> x = torch.tensor([0.3, -1.25, 70.0])
        >>> round_activations(x, qint8, scale=torch.tensor(0.5))
        tensor([ 0.5000, -1.0000, 63.5000])
    """
    values = x.float()
    features = sizes(values)[-1]
    grouped = scale is None and 0 < group < features
    if grouped:
        values = F.pad(values, (0, -features % group)).unflatten(-1, (-1, group))
    if scale is None:
        scale = values.abs().amax(-1, keepdim=True) / kind.qmax
    else:
        check_scale(scale)
        # it broadcasts whatever its own dimensions are
        scale = scale.reshape(())
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    numbers = values / scale
    if kind.float_dtype is None:
        numbers = numbers.round().clamp(kind.qmin, kind.qmax)
    else:
        numbers = numbers.clamp(kind.qmin, kind.qmax).to(kind.float_dtype).float()
    rounded = numbers * scale
    # not an index with "...", which a trace turns into the number of a dimension
    return rounded.flatten(-2).narrow(-1, 0, features) if grouped else rounded


def scale_gradient(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """The same values, with the gradient multiplied by ``factor``. The gradient of a step size grows with the number of
    values that share it; Esser et al., 2020, https://arxiv.org/abs/1902.08153, section 2.2, divides by its root."""
    scaled = tensor * factor
    return (tensor - scaled).detach() + scaled
