"""Registers the native kernel of ``embedding`` (``dequantize`` of csrc/decode.h, which takes row numbers)."""

from typing import Any

import torch

from quanto_hf.ops.cpu.call import native_dequantize
from quanto_hf.ops.cpu.kernels import on_cpu, plain, refuses_weight
from quanto_hf.ops.embedding import embedding_op


def refuses_embedding(
    index: Any, packed: Any, scale: Any, zero: Any, qtype: str, group_size: int, columns: int, dtype: Any
) -> str | None:
    """Why the native kernel does not take these arguments, or None."""
    if not index.numel() or not packed.numel():
        return "there is nothing to dequantize"
    if not on_cpu(index):
        return "it runs on CPU only"
    # a copy would be one of all rows
    if not all(t is None or (t.is_contiguous() and not t.is_neg()) for t in (packed, scale, zero)):
        return "the rows of the weight do not lie in memory one after another"
    return refuses_weight(packed, scale, zero, qtype, group_size, dtype, False)


@embedding_op.kernel("native", refuses_embedding)
def _embedding(
    index: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    qtype: str,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """One pass over the codes of the rows that are asked for."""
    rows = plain(index.reshape(-1).to(torch.int64))
    out = scale.new_empty((*index.shape, in_features), dtype=dtype)
    native_dequantize(packed, scale, zero, qtype, group_size, out.view(-1, in_features), rows)
    return out
