"""Rounding to a grid of integers, or of 8-bit floats, with a scale and a zero point."""

import torch

from quanto_hf.nn.observers import number


def round_to_grid(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    dtype: str = "quint8",
) -> torch.Tensor:
    """The numbers of the grid that are next to those of ``x``: quantize, then dequantize.

    The gradient to ``x`` passes straight through where ``x`` is on the grid's range, and is 0 outside.

    Args:
        x: float, any shape.
        scale: float32, one element, or one for each channel.
        zero_point: code of 0, the shape of ``scale``; a float of any value for float qparams.
        quant_min: smallest code.
        quant_max: largest code.
        axis: dimension of the channels, or None for one scale.
        dtype: name of the number type; only an 8-bit float makes a difference.

    Returns:
        The shape and dtype of ``x``, computed in float32.

    Example:
        >>> round_to_grid(torch.tensor([0.24, 0.26, 9.0]), torch.tensor([0.5]), torch.tensor([1]), 0, 7)
        tensor([0.0000, 0.5000, 3.0000])
    """
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    scale, zero_point = _along(axis, x, scale), _along(axis, x, zero_point)
    codes = values.detach() / scale.detach()
    if number(dtype).is_float:
        on_range = (codes >= quant_min) & (codes <= quant_max)
        codes = codes.clamp(quant_min, quant_max).to(getattr(torch, dtype)).to(values.dtype)
    else:
        # a zero point that is no integer shifts what is rounded
        codes = (codes + zero_point).round() if zero_point.is_floating_point() else codes.round() + zero_point
        on_range = (codes >= quant_min) & (codes <= quant_max)
        codes = codes.clamp(quant_min, quant_max) - zero_point
    rounded = codes * scale.detach()
    if values.requires_grad:
        # the difference is exactly 0: the result is the same number with and without a gradient
        inside = torch.where(on_range, values, torch.zeros_like(values))
        rounded = rounded + (inside - inside.detach())
    return rounded.to(x.dtype)


def round_with_learned_scale(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    dtype: str = "quint8",
) -> torch.Tensor:
    """As :func:`round_to_grid`, with a gradient to the scale.

    Esser et al., "Learned Step Size Quantization", ICLR 2020: the gradient of a value on the range is its rounding
    error in steps, that of a value outside is the code of the end; all are divided by
    sqrt(values per scale * largest code).

    Args: see :func:`round_to_grid`.
    """
    rounded = round_to_grid(x.detach(), scale.detach(), zero_point, quant_min, quant_max, axis, dtype)
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    count = x.numel() / scale.numel()
    shrink = 1.0 / max(count * max(abs(quant_max), abs(quant_min)), 1.0) ** 0.5
    scale, zero_point = _along(axis, x, scale), _along(axis, x, zero_point)
    step = scale.detach() + shrink * (scale - scale.detach())
    low, high = quant_min - zero_point.to(scale.dtype), quant_max - zero_point.to(scale.dtype)
    steps = torch.minimum(torch.maximum(values / step, low), high)
    codes = steps.detach().round() + (steps - steps.detach())
    # only the gradient of the product counts: its value is the one above, to the last bit
    product = codes * step
    difference: torch.Tensor = (product - product.detach()).to(x.dtype)
    return rounded + difference


def _along(axis: int | None, x: torch.Tensor, each: torch.Tensor) -> torch.Tensor:
    """One number for each channel, in a shape that broadcasts to ``x``; without an axis as it is."""
    return each if axis is None else each.view([-1 if d == axis % x.dim() else 1 for d in range(x.dim())])
