"""Dynamic quantization of activations: each token has its own scale, found when it passes. No data is needed."""

import torch

from quanto_hf.qtypes import QType


def fake_quantize(x: torch.Tensor, qtype: QType) -> torch.Tensor:
    """Round activations to the numbers that ``qtype`` can hold, with one absmax scale per token.

    The numbers are exactly those of a quantized product; memory and speed are those of the float one. The gradient
    passes straight through.

    Args:
        x: float, shape (..., features).
        qtype: int8 or an 8-bit float.

    Returns:
        The shape and dtype of ``x``.
    """
    values = x.detach().float()
    scale = values.abs().amax(-1, keepdim=True) / qtype.qmax
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    numbers = values / scale
    if qtype.float_dtype is None:
        numbers = numbers.round().clamp_(qtype.qmin, qtype.qmax)
    else:
        numbers = numbers.clamp_(qtype.qmin, qtype.qmax).to(qtype.float_dtype).float()
    quantized = (numbers * scale).to(x.dtype)
    return x + (quantized - x).detach() if x.requires_grad else quantized
