"""Rows of an embedding with everything looked up in advance, as ``bound.py`` has it."""

from collections.abc import Callable

import torch

from quanto_hf.ops.cpu.bound import may_bind, whereabouts
from quanto_hf.ops.cpu.call import FLOAT_TYPES, THREAD_VALUES, weight_arguments
from quanto_hf.ops.cpu.embedding import refuses_embedding
from quanto_hf.ops.cpu.library import NATIVE
from quanto_hf.ops.dequantize import check_weight
from quanto_hf.ops.watched import watched

BoundEmbedding = Callable[[torch.Tensor, torch.dtype], "torch.Tensor | None"]


def bind_embedding(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    qtype: str,
    group_size: int,
    in_features: int,
) -> BoundEmbedding | None:
    """``call(index, dtype)`` for one weight, or None where there is no native kernel for it.

    The call gives what :func:`quanto_hf.ops.embedding` gives, to the bit. It answers None when it cannot serve: the
    index is not what it was made for (another device or dtype than int64, a view that is not contiguous, a row that
    does not exist), or the weight has moved. Who called then takes the general way.

    Args:
        packed: codes of ``qtype``, shape (rows, bytes per row).
        scale: shape (rows, groups).
        zero: None or the shape of ``scale``.
        qtype: the name of a number type.
        group_size: columns that share a scale, -1 for all.
        in_features: columns.

    Raises:
        ValueError: the tensors are not those of such a weight.
    """
    check_weight(packed, scale, zero, qtype, group_size, in_features)
    if not may_bind(packed, scale, zero):
        return None
    assert NATIVE is not None
    weight = weight_arguments(packed, scale, zero, qtype, group_size, in_features)
    unmoved = whereabouts(packed, scale, zero)
    trusted: set[torch.dtype] = set()
    run, threads, types = NATIVE.dequantize, torch.get_num_threads, FLOAT_TYPES

    def call(index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        if (
            type(index) is not torch.Tensor
            or index.dtype is not torch.int64
            or not index.is_cpu
            or not index.is_contiguous()
            or index.is_neg()
            or watched()
            or not unmoved()
        ):
            return None
        count, kind = index.numel(), types.get(dtype)
        if not count or kind is None:
            return None
        if dtype not in trusted:
            if refuses_embedding(index, packed, scale, zero, qtype, group_size, in_features, dtype):
                return None
            trusted.add(dtype)
        out = scale.new_empty((*index.shape, in_features), dtype=dtype)
        most = min(threads(), 1 + count * in_features // THREAD_VALUES)
        # row numbers are looked at before anything else is read; the general way names the one that does not exist
        found = run(*weight, index.data_ptr(), count, out.data_ptr(), kind, most)
        return out if found else None

    return call
