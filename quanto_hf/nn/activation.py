"""Dynamic quantization of activations in plain torch: scales are found when a token passes. No data is needed."""

import torch

from quanto_hf.ops import TOKEN, round_activations
from quanto_hf.qtypes import QType


def fake_quantize(x: torch.Tensor, qtype: QType, group: int = TOKEN) -> torch.Tensor:
    """Round activations to the numbers that ``qtype`` can hold, with one absmax scale per token or per ``group``
    columns of it.

    The numbers are exactly those of a quantized product; memory and speed are those of the float one. The gradient
    passes straight through.

    Args:
        x: float, shape (..., features).
        qtype: int8 or an 8-bit float.
        group: columns that share a scale, -1 for all. What a weight asks for is in
            :func:`quanto_hf.ops.activation_group`.

    Returns:
        The shape and dtype of ``x``.
    """
    quantized = round_activations(x.detach(), qtype, group).to(x.dtype)
    return x + (quantized - x).detach() if x.requires_grad else quantized
