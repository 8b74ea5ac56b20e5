"""Kernels of all ops in plain torch, for every device and for machines without native kernels.

``torch_int8pack`` is torch's own int8 product; ``torch_blocks`` dequantizes a block of rows into a reused buffer,
multiplies, and goes on with the next block. A native kernel registers itself before these.
"""

from typing import Any

import torch
import torch.nn.functional as F

from quanto_hf.ops.decode import decode
from quanto_hf.ops.dequantize import block_rows, dequantize, dequantize_rows
from quanto_hf.ops.embedding import embedding_op
from quanto_hf.ops.linear import linear_grad_input, linear_op
from quanto_hf.ops.scratch import scratch
from quanto_hf.qtypes import QTYPES

# Above this many rows torch's int8 product loses to block copy + matmul (benchmarks/linear.py, 4096 x 4096, bfloat16).
INT8PACK_MAX_ROWS = 8
# It reads whole vectors of 16 columns and checks nothing: 132 columns read behind the end of both tensors, with wrong
# results or a segmentation fault (torch 2.13, AVX-512).
INT8PACK_COLUMNS = 16


def _int8pack_refuses(x: Any, packed: Any, scale: Any, zero: Any, bias: Any, qtype: str, group_size: int) -> str | None:
    if qtype != "int8" or group_size > 0 or zero is not None:
        return "it multiplies symmetric per-channel int8 weights only"
    if x.dtype is not torch.bfloat16:
        return "torch's int8 product is fast in bfloat16 only"
    if x.device.type != "cpu":
        return "it runs on CPU only"
    if x.shape[-1] % INT8PACK_COLUMNS or not x.numel():
        return f"in_features must be a multiple of {INT8PACK_COLUMNS}, and the input not empty"
    if x.numel() > INT8PACK_MAX_ROWS * x.shape[-1]:
        return f"above {INT8PACK_MAX_ROWS} rows block copy and matmul is faster"
    return None


@linear_op.kernel("torch_int8pack", _int8pack_refuses)
def _linear_int8pack(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    qtype: str,
    group_size: int,
) -> torch.Tensor:
    """torch's own product of bfloat16 and int8. It wants a bfloat16 scale, which would shift whole channels by up to
    0.2 %: ones are given instead, and the float32 scale multiplies the output."""
    ones = scratch("ones", (packed.shape[0],), torch.bfloat16, x.device).fill_(1.0)
    out = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]).contiguous(), packed, ones)
    return _finish(out, scale, bias).view(*x.shape[:-1], packed.shape[0])


def _finish(out: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Channel scale, then bias, in float32; the result in the dtype of ``out``."""
    channel = scale.view(-1)
    result = out * channel if bias is None else torch.addcmul(bias.to(channel.dtype), out.to(channel.dtype), channel)
    return result.to(out.dtype)


def _scales_output(qtype: str, group_size: int, zero: torch.Tensor | None, dtype: torch.dtype) -> bool:
    """Whether one scale per row can multiply the output instead of the weight: one pass over the weight less.

    Not in float16, where codes of up to 57344 times an input overflow.
    """
    return group_size < 0 and zero is None and not QTYPES[qtype].is_packed and dtype is not torch.float16


@linear_op.kernel("torch_blocks", lambda *args: None)
def _linear_blocks(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    qtype: str,
    group_size: int,
) -> torch.Tensor:
    """Dequantize a block of rows into a reused buffer, multiply, go on with the next block."""
    columns, rows = x.shape[-1], packed.shape[0]
    flat = x.reshape(-1, columns)
    out = x.new_empty((flat.shape[0], rows))
    late = _scales_output(qtype, group_size, zero, x.dtype)
    step = block_rows(columns, x.dtype)
    for start in range(0, rows, step):
        cut = slice(start, min(start + step, rows))
        weight = scratch("weight", (cut.stop - start, columns), x.dtype, x.device)
        if late:
            decode(packed[cut], QTYPES[qtype], weight)
        else:
            dequantize_rows(packed[cut], scale[cut], None if zero is None else zero[cut], qtype, group_size, weight)
        out[:, cut] = F.linear(flat, weight, None if late or bias is None else bias[cut])
    return (_finish(out, scale, bias) if late else out).view(*x.shape[:-1], rows)


@linear_grad_input.kernel("torch_blocks", lambda *args: None)
def _grad_blocks(
    grad: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    qtype: str,
    group_size: int,
    in_features: int,
) -> torch.Tensor:
    """The same block by block; the sum over blocks is kept in float32."""
    # not reshape(-1, ...), which is ambiguous for a weight without rows
    flat = grad.reshape(grad.shape[:-1].numel(), grad.shape[-1])
    total = flat.new_zeros((flat.shape[0], in_features), dtype=torch.float32)
    step = block_rows(in_features, grad.dtype)
    for start in range(0, packed.shape[0], step):
        cut = slice(start, min(start + step, packed.shape[0]))
        weight = scratch("weight", (cut.stop - start, in_features), grad.dtype, grad.device)
        dequantize_rows(packed[cut], scale[cut], None if zero is None else zero[cut], qtype, group_size, weight)
        total += flat[:, cut] @ weight
    return total.to(grad.dtype).view(*grad.shape[:-1], in_features)


@dequantize.kernel("torch_blocks", lambda *args: None)
def _dequantize_blocks(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    qtype: str,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows in blocks, so that the temporaries stay small."""
    out = scale.new_empty((packed.shape[0], in_features), dtype=dtype)
    step = block_rows(in_features, dtype)
    for start in range(0, packed.shape[0], step):
        rows = slice(start, start + step)
        dequantize_rows(packed[rows], scale[rows], None if zero is None else zero[rows], qtype, group_size, out[rows])
    return out


@embedding_op.kernel("torch_rows", lambda *args: None)
def _embedding_rows(
    index: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    qtype: str,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The packed rows are gathered, then dequantized, in blocks so that the temporaries stay small."""
    rows = index.reshape(-1).to(torch.int64)
    out = scale.new_empty((rows.shape[0], in_features), dtype=dtype)
    step = block_rows(in_features, dtype)
    for start in range(0, rows.shape[0], step):
        cut = slice(start, start + step)
        some = rows[cut]
        zeros = None if zero is None else zero[some]
        dequantize_rows(packed[some], scale[some], zeros, qtype, group_size, out[cut])
    return out.view(*index.shape, in_features)
