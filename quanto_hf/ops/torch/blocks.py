"""Kernels in plain torch that dequantize a block of rows into a reused buffer, use it, and go on with the next block;
and ``torch_int8pack``, torch's own int8 product."""

from typing import Any

import torch
import torch.nn.functional as F

from quanto_hf.ops.dequantize import dequantize_op
from quanto_hf.ops.linear import linear_grad_input, linear_op
from quanto_hf.ops.linear_rounded import linear_rounded_op, rounded
from quanto_hf.ops.scratch import scratch
from quanto_hf.ops.weight import GroupedWeight, Weight

# Above this many rows torch's int8 product loses to block copy + matmul (benchmarks/linear.py, 4096 x 4096, bfloat16).
INT8PACK_MAX_ROWS = 8
# It reads whole vectors of 16 columns and checks nothing: 132 columns read behind the end of both tensors, with wrong
# results or a segmentation fault (torch 2.13, AVX-512).
INT8PACK_COLUMNS = 16


def _int8pack_supports(x: Any, weight: GroupedWeight, bias: Any) -> str | None:
    if weight.qtype != "int8" or weight.group_size > 0 or weight.zero is not None:
        return "it multiplies symmetric per-channel int8 weights only"
    if x.dtype is not torch.bfloat16:
        return "torch's int8 product is fast in bfloat16 only"
    if x.shape[-1] % INT8PACK_COLUMNS or not x.numel():
        return f"in_features must be a multiple of {INT8PACK_COLUMNS}, and the input not empty"
    if x.numel() > INT8PACK_MAX_ROWS * x.shape[-1]:
        return f"above {INT8PACK_MAX_ROWS} rows block copy and matmul is faster"
    return None


@linear_op.kernel("torch_int8pack", _int8pack_supports, device="cpu", kinds=(GroupedWeight,))
def _linear_int8pack(x: torch.Tensor, weight: GroupedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """torch's own product of bfloat16 and int8. It wants a bfloat16 scale, which would shift whole channels by up to
    0.2 %: ones are given instead, and the float32 scale multiplies the output."""
    rows = weight.shape[0]
    ones = scratch("ones", (rows,), torch.bfloat16, x.device).fill_(1.0)
    out = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]).contiguous(), weight.packed, ones)
    return _finish(out, weight.scale, bias).view(*x.shape[:-1], rows)


def _finish(out: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Channel scale, then bias, in float32; the result in the dtype of ``out``."""
    channel = scale.view(-1)
    result = out * channel if bias is None else torch.addcmul(bias.to(channel.dtype), out.to(channel.dtype), channel)
    return result.to(out.dtype)


def _scales_output(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether one scale per row can multiply the output instead of the weight: one pass over the weight less.

    Not in float16, where codes of up to 57344 times an input overflow.
    """
    if not isinstance(weight, GroupedWeight) or dtype is torch.float16:
        return False
    return weight.group_size < 0 and weight.zero is None and not weight.type.is_packed


@linear_op.kernel("torch_blocks")
def _linear_blocks(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """Dequantize a block of rows, multiply, go on with the next block."""
    rows, columns = weight.shape
    # not reshape(-1, ...), which is ambiguous for a weight without columns
    flat = x.reshape(x.shape[:-1].numel(), columns)
    out = x.new_empty((flat.shape[0], rows))
    late = _scales_output(weight, x.dtype)
    for cut, part in weight.blocks(x.dtype, scaled=not late):
        out[:, cut] = F.linear(flat, part, None if late or bias is None else bias[cut])
    if late:
        assert isinstance(weight, GroupedWeight)
        out = _finish(out, weight.scale, bias)
    return out.view(*x.shape[:-1], rows)


@linear_grad_input.kernel("torch_blocks")
def _grad_blocks(grad: torch.Tensor, weight: Weight) -> torch.Tensor:
    """The same block by block; the sum over blocks is kept in float32."""
    rows, columns = weight.shape
    flat = grad.reshape(grad.shape[:-1].numel(), rows)
    total = flat.new_zeros((flat.shape[0], columns), dtype=torch.float32)
    for cut, part in weight.blocks(grad.dtype):
        total += flat[:, cut] @ part
    return total.to(grad.dtype).view(*grad.shape[:-1], columns)


@dequantize_op.kernel("torch_blocks")
def _dequantize_blocks(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Rows in blocks, so that the temporaries stay small."""
    scale = weight.stored[1]
    assert scale is not None
    out = scale.new_empty(weight.shape, dtype=dtype)
    for _ in weight.blocks(dtype, out):
        pass
    return out


@linear_rounded_op.kernel("rounding, linear")
def _rounding_linear(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, activations: str, x_scale: torch.Tensor | None
) -> torch.Tensor:
    """x is rounded, then multiplied by the best kernel of ``linear``."""
    args = (rounded(x, weight, activations, x_scale), weight, bias)
    made: torch.Tensor = linear_op.choose(*args)(*args)
    return made
