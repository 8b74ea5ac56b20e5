"""Kernels of ``embedding`` in plain torch: the stored rows are gathered, then dequantized."""

import torch

from quanto_hf.ops.aqlm_weight import AqlmWeight
from quanto_hf.ops.dequantize import dequantize_op
from quanto_hf.ops.embedding import embedding_op
from quanto_hf.ops.grouped_weight import GroupedWeight, block_rows


@embedding_op.kernel("torch_rows", kinds=(GroupedWeight,))
def _rows(index: torch.Tensor, weight: GroupedWeight, dtype: torch.dtype) -> torch.Tensor:
    """In blocks, so that the temporaries stay small."""
    rows, columns = index.reshape(-1).to(torch.int64), weight.in_features
    out = weight.scale.new_empty((rows.shape[0], columns), dtype=dtype)
    step = block_rows(columns, dtype)
    for start in range(0, rows.shape[0], step):
        cut = slice(start, start + step)
        weight.rows(rows[cut]).into(out[cut])
    return out.view(*index.shape, columns)


@embedding_op.kernel("torch_rows", kinds=(AqlmWeight,))
def _aqlm_rows(index: torch.Tensor, weight: AqlmWeight, dtype: torch.dtype) -> torch.Tensor:
    """The blocks that hold the rows are dequantized by the best kernel of ``dequantize``."""
    out_group = weight.codebooks.shape[2]
    wanted = index.reshape(-1).to(torch.int64)
    args = (weight.rows(wanted.div(out_group, rounding_mode="floor")), dtype)
    made: torch.Tensor = dequantize_op.choose(*args)(*args)
    # out_group rows for each row that is asked for
    made = made.view(-1, out_group, made.shape[-1])
    picked = made[torch.arange(len(wanted), device=made.device, dtype=torch.int64), wanted % out_group]
    return picked.view(*index.shape, weight.shape[1])
