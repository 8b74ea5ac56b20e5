"""Kernels of the AQLM ops in plain torch, for every device: blocks of rows are dequantized into a reused buffer."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from quanto_hf.ops.aqlm import aqlm_dequantize_op, aqlm_linear_grad_input, aqlm_linear_op, features
from quanto_hf.ops.dequantize import block_rows
from quanto_hf.ops.scratch import scratch


def decode_blocks(
    codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of rows of the weight, one after the other in the same buffer."""
    count, size, out_group, in_group = codebooks.shape
    entries = codebooks.float().view(count * size, out_group * in_group)
    first = torch.arange(0, count * size, size, device=codes.device, dtype=torch.int64)
    columns = codes.shape[1] * in_group
    step = max(1, block_rows(columns, torch.float32) // out_group)
    for start in range(0, codes.shape[0], step):
        some = codes[start : start + step]
        index = (some.long() & (size - 1)) + first
        blocks = entries[index[..., 0]]
        for k in range(1, count):
            blocks += entries[index[..., k]]
        blocks = blocks.view(*some.shape[:2], out_group, in_group).mul_(scales[start : start + step].float())
        rows = slice(start * out_group, (start + len(some)) * out_group)
        weight = scratch("weight", (rows.stop - rows.start, columns), dtype, codes.device)
        weight.view(len(some), out_group, some.shape[1], in_group).copy_(blocks.transpose(1, 2))
        yield rows, weight


@aqlm_dequantize_op.kernel("torch_blocks", lambda *args: None)
def _dequantize(codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows in blocks, so that the temporaries stay small."""
    out = codebooks.new_empty(features(codes, codebooks), dtype=dtype)
    for rows, weight in decode_blocks(codes, codebooks, scales, dtype):
        out[rows] = weight
    return out


@aqlm_linear_op.kernel("torch_blocks", lambda *args: None)
def _linear(
    x: torch.Tensor, codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Dequantize a block of rows, multiply, go on with the next block."""
    rows, columns = features(codes, codebooks)
    # not reshape(-1, ...), which is ambiguous for a weight without columns
    flat = x.reshape(x.shape[:-1].numel(), columns)
    out = x.new_empty((flat.shape[0], rows))
    for cut, weight in decode_blocks(codes, codebooks, scales, x.dtype):
        out[:, cut] = F.linear(flat, weight, None if bias is None else bias[cut])
    return out.view(*x.shape[:-1], rows)


@aqlm_linear_grad_input.kernel("torch_blocks", lambda *args: None)
def _grad_input(grad: torch.Tensor, codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The same block by block; the sum over blocks is kept in float32."""
    rows, columns = features(codes, codebooks)
    flat = grad.reshape(grad.shape[:-1].numel(), rows)
    total = flat.new_zeros((flat.shape[0], columns), dtype=torch.float32)
    for cut, weight in decode_blocks(codes, codebooks, scales, grad.dtype):
        total += flat[:, cut] @ weight
    return total.to(grad.dtype).view(*grad.shape[:-1], columns)
