"""Registers the native kernels of ``embedding`` (``dequantize`` of csrc/decode.h, which takes row numbers) and of
``expert_linear`` (csrc/experts.cpp)."""

from collections.abc import Callable
from typing import Any

import torch

from quanto_hf.ops.cpu.call import FLOAT_TYPES, THREAD_VALUES, arguments, native_dequantize, native_expert_linear
from quanto_hf.ops.cpu.library import NATIVE, label
from quanto_hf.ops.cpu.products import lies_in_memory, optional, plain, refuses_weight
from quanto_hf.ops.embedding import embedding_op
from quanto_hf.ops.expert_linear import expert_linear_op
from quanto_hf.ops.kernel import Call
from quanto_hf.ops.selfcheck import FEW_ROWS
from quanto_hf.ops.weight import GroupedWeight

KINDS = (GroupedWeight,)


def _supports_rows(index: Any, weight: GroupedWeight, dtype: torch.dtype) -> str | None:
    if not index.numel() or not weight.packed.numel():
        return "there is nothing to dequantize"
    # a copy would be one of all rows
    if not lies_in_memory(weight):
        return "the rows of the weight do not lie in memory one after another"
    return refuses_weight(weight)


def _bound_rows(refuses: Callable[..., str | None], weight: GroupedWeight) -> Call | None:
    """``call(index, dtype)`` for this weight."""
    if refuses_weight(weight) is not None:
        return None
    assert NATIVE is not None
    at, columns = arguments(weight), weight.in_features
    # what makes the result: a plain tensor does it 0.1 us faster than a stored one
    like = weight.scale.new_empty(0)
    run, threads, types = NATIVE.dequantize, torch.get_num_threads, FLOAT_TYPES
    trusted: set[torch.dtype] = set()

    def call(index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        count, kind = index.numel(), types.get(dtype)
        if not count or kind is None or index.dtype is not torch.int64:
            return None
        if dtype not in trusted:
            if refuses(index, weight, dtype):
                return None
            trusted.add(dtype)
        out = like.new_empty((*index.shape, columns), dtype=dtype)
        most = min(threads(), 1 + count * columns // THREAD_VALUES)
        # row numbers are looked at before anything else is read; the general way names the one that does not exist
        return out if run(*at, index.data_ptr(), count, out.data_ptr(), kind, most) else None

    return call


@embedding_op.kernel("native", _supports_rows, device="cpu", kinds=KINDS, bind=_bound_rows, label=label)
def _rows(index: torch.Tensor, weight: GroupedWeight, dtype: torch.dtype) -> torch.Tensor:
    """One pass over the codes of the rows that are asked for."""
    rows = plain(index.reshape(-1).to(torch.int64))
    out = weight.scale.new_empty((*index.shape, weight.in_features), dtype=dtype)
    native_dequantize(weight, out.view(-1, weight.in_features), rows)
    return out


def _supports_experts(x: Any, experts: Any, weight: GroupedWeight, bias: Any) -> str | None:
    if not x.numel() or not weight.packed.numel():
        return "there is nothing to multiply"
    # a copy would be one of all experts
    if not lies_in_memory(weight):
        return "the weights of the experts do not lie in memory one after another"
    return refuses_weight(weight)


def _bound_experts(refuses: Callable[..., str | None], weight: GroupedWeight) -> Call | None:
    """``call(x, experts, bias)`` for these weights."""
    if refuses_weight(weight) is not None:
        return None
    assert NATIVE is not None
    at, (number, rows, columns) = arguments(weight), weight.shape
    bias_shape = weight.packed.shape[:2]
    run, threads, types = NATIVE.expert_linear, torch.get_num_threads, FLOAT_TYPES
    trusted: set[tuple[torch.dtype, bool]] = set()

    def call(x: torch.Tensor, experts: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        shape, dtype = x.shape, x.dtype
        kind = types.get(dtype)
        if kind is None or len(shape) != 2 or shape[1] != columns:
            return None
        m = shape[0]
        if not m or experts.dtype is not torch.int64 or experts.shape != (m,):
            return None
        if bias is not None and (bias.dtype is not dtype or bias.shape != bias_shape):
            return None
        key = (dtype, m > FEW_ROWS)
        if key not in trusted:
            if refuses(x, experts, weight, bias):
                return None
            trusted.add(key)
        # not torch.empty, which looks at the default device
        out = x.new_empty((m, rows))
        bias_at = 0 if bias is None else bias.data_ptr()
        # ids are looked at before anything else is read; the general way names the one that does not exist
        found = run(*at, x.data_ptr(), bias_at, out.data_ptr(), m, kind, threads(), experts.data_ptr(), number)
        return out if found else None

    return call


@expert_linear_op.kernel("native", _supports_experts, device="cpu", kinds=KINDS, bind=_bound_experts, label=label)
def _expert_linear(
    x: torch.Tensor, experts: torch.Tensor, weight: GroupedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """Rows are counted and put in order in C++; then the level's ``linear``, expert by expert."""
    return native_expert_linear(plain(x), plain(experts), weight, optional(bias))
