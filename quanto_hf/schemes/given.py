"""Methods of grouped schemes for scales that are given: by an observer, or by training."""

from typing import TYPE_CHECKING

import torch

from quanto_hf.ops import pack, scale_gradient

if TYPE_CHECKING:
    from quanto_hf.schemes.grouped import Grouped

Maybe = torch.Tensor | None


def encode(scheme: "Grouped", weight: torch.Tensor, scale: torch.Tensor, zero: Maybe = None) -> dict[str, torch.Tensor]:
    """The stored tensors of a weight, shape (..., out_features, in_features). Scale and zero are rounded to their
    stored dtype before a code is chosen.

    Raises:
        ValueError: scale or zero has the wrong shape, or is not what it must be.
    """
    specs, columns = scheme.tensors(tuple(weight.shape), weight.dtype), weight.shape[-1]
    result: dict[str, torch.Tensor] = {}
    for name, given in (("scale", scale), ("zero", zero)):
        wanted = specs[name].shape if name in specs else None
        came = None if given is None else tuple(given.shape)
        if came != wanted:
            raise ValueError(
                f"the {name} of a {scheme} weight of shape {tuple(weight.shape)} has shape {wanted}, but this is {came}"
            )
        if given is not None:
            result[name] = scheme.scale_type.store(given.detach().to(weight.device))
    read = {name: scheme.scale_type.read(tensor) for name, tensor in result.items()}
    used = read["scale"].abs() if scheme.signed_scales else read["scale"]
    if not bool((used > 0).all()) or not all(bool(torch.isfinite(t).all()) for t in read.values()):
        sign = "finite numbers other than 0" if scheme.signed_scales else "positive and finite numbers"
        raise ValueError(f"scales of a {scheme} weight are {sign}, and zeros are finite")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight has NaN or infinite values, which cannot be quantized")
    u = weight.detach().float() / _spread(scheme, read["scale"], columns)
    if "zero" in read:
        u += _spread(scheme, read["zero"], columns)
    codes = scheme.grid.encode(u.contiguous(), torch.empty(u.shape, dtype=scheme.type.storage, device=u.device))
    return {"packed": pack(codes, scheme.type.bits), **result}


def fake_quantize(scheme: "Grouped", weight: torch.Tensor, scale: torch.Tensor, zero: Maybe = None) -> torch.Tensor:
    """The numbers that :func:`encode` stores for a weight of 2 dimensions, float32, with gradients: to the weight where
    it is inside of the range, to the scale those of Esser et al., "Learned Step Size Quantization", 2020,
    https://arxiv.org/abs/1902.08153, and to the zero those of Bhalgat et al., "LSQ+", 2020,
    https://arxiv.org/abs/2004.09576.
    """
    columns, grid = weight.shape[-1], scheme.grid
    exact = scheme.dequantize(encode(scheme, weight, scale, zero), columns, torch.float32)
    width = min(scheme.group_size, columns) if scheme.group_size > 0 else columns
    factor = 1 / (max(width, 1) * max(abs(grid.lowest), abs(grid.highest))) ** 0.5
    step = _spread(scheme, scale_gradient(scale, factor), columns)
    shift = _spread(scheme, scale_gradient(zero, factor), columns) if zero is not None else torch.zeros_like(step)
    # derivatives as they are written down: those of a division overflow where a scale is next to 0
    with torch.no_grad():
        u, number = weight.float() / step + shift, exact / step + shift
        inside = (u >= grid.lowest) & (u <= grid.highest)
        by_step = torch.where(inside, number - u, number - shift)
        by_shift = torch.where(inside, torch.zeros_like(step), -step)
    surrogate = weight.float().where(inside, torch.zeros_like(exact)) + step * by_step + shift * by_shift
    # the value is the stored one to the last bit, the gradient that of the surrogate
    return exact + (surrogate - surrogate.detach())


def _spread(scheme: "Grouped", each: torch.Tensor, columns: int) -> torch.Tensor:
    """One value per group to one per column; a row that is one group broadcasts by itself."""
    if scheme.group_size <= 0:
        return each
    return each.repeat_interleave(scheme.group_size, -1)[..., :columns]
