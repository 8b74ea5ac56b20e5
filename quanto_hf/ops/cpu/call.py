"""Calls of the native library with tensors: the last step, after every check. All tensors are contiguous and on the
CPU, and outlive the call."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from quanto_hf.ops.cpu.library import NATIVE
from quanto_hf.ops.grouped_weight import symmetric_offset
from quanto_hf.ops.weight import PREFIXES, AqlmWeight, GroupedWeight, Weight
from quanto_hf.qtypes import QTYPES

# The numbers of csrc/common.h.
FLOAT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Values that are dequantized for each thread that is woken: about 4 us of work.
THREAD_VALUES = 1 << 14


@cache
def value_table(qtype: str, asymmetric: bool) -> torch.Tensor:
    """The 16 numbers that codes stand for, float32; codes of 8 bits do not look at it."""
    kind = QTYPES[qtype]
    # by name, whatever the defaults are at the first call: the table is kept
    table = torch.zeros(16, dtype=torch.float32, device="cpu")
    if kind.values is not None:
        table[:] = torch.tensor(kind.values, dtype=torch.float32, device="cpu")
    elif kind.is_packed:
        numbers = torch.arange(kind.levels, dtype=torch.float32, device="cpu")
        table[: kind.levels] = numbers - (0 if asymmetric else symmetric_offset(kind))
    return table


def _grouped(weight: GroupedWeight) -> tuple[int, ...]:
    packed, scale, zero, qtype, group_size, in_features = weight
    code = weight.type.native
    assert code is not None
    return (
        packed.data_ptr(),
        scale.data_ptr(),
        0 if zero is None else zero.data_ptr(),
        value_table(qtype, zero is not None).data_ptr(),
        packed.shape[-2],
        in_features,
        group_size,
        code,
        FLOAT_TYPES[scale.dtype],
    )


def _additive(weight: AqlmWeight) -> tuple[int, ...]:
    codes, codebooks, scales = weight
    count, size, out_group, in_group = codebooks.shape
    return (
        *(tensor.data_ptr() for tensor in weight),
        *weight.shape,
        count,
        out_group,
        in_group,
        size.bit_length() - 1,
        codes.dtype.itemsize,
        FLOAT_TYPES[codebooks.dtype],
        FLOAT_TYPES[scales.dtype],
    )


ARGUMENTS: dict[type[Any], Callable[[Any], tuple[int, ...]]] = {GroupedWeight: _grouped, AqlmWeight: _additive}


def arguments(weight: Weight) -> tuple[int, ...]:
    """A weight, or that of expert 0, as csrc/module.cpp reads it."""
    return ARGUMENTS[type(weight)](weight)


def native_dequantize(weight: Weight, out: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Dequantize into ``out``, shape (rows, in_features): all rows of the weight, or those that ``rows`` names.

    Args:
        rows: None or int64, of a :class:`GroupedWeight`.

    Raises:
        IndexError: there is no such row. Nothing but the row numbers has been read then.
    """
    assert NATIVE is not None
    # one row of an embedding is done before a second thread is awake
    last = (out.data_ptr(), FLOAT_TYPES[out.dtype], min(torch.get_num_threads(), 1 + out.numel() // THREAD_VALUES))
    prefix = PREFIXES[type(weight)]
    # of additive codes all rows are dequantized
    picked = () if prefix else (0, weight.shape[0]) if rows is None else (rows.data_ptr(), rows.numel())
    if getattr(NATIVE, f"{prefix}dequantize")(*arguments(weight), *picked, *last) is False:
        raise IndexError(f"a row number is not one of 0 to {weight.shape[0] - 1}")
    return out


def linear_name(weight: Weight, activations: str | None = None) -> str:
    """The native function that multiplies such weights."""
    if activations is None:
        return f"{PREFIXES[type(weight)]}linear"
    return "linear_int8" if weight.what == "int8" else "linear_int8_groups"


def native_linear(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None = None,
    activations: str | None = None,
    x_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ weight.T + bias``.

    Args:
        activations: "int8" rounds x first (``ops/activation.py``); for weights that ``refuses_int8`` takes.
        x_scale: with activations, the scale of all of x, one float32 number; None: scales are found from x.
    """
    rows, columns = weight.shape
    out = x.new_empty((*x.shape[:-1], rows))
    getattr(NATIVE, linear_name(weight, activations))(
        *arguments(weight),
        x.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        x.numel() // columns,
        FLOAT_TYPES[x.dtype],
        torch.get_num_threads(),
        *scale_argument(activations, x_scale),
    )
    return out


def scale_argument(activations: str | None, x_scale: torch.Tensor | None) -> tuple[int, ...]:
    """What the functions with rounded x take behind the arguments of ``linear``."""
    if activations is None:
        return ()
    return (0 if x_scale is None else x_scale.data_ptr(),)


def native_expert_linear(
    x: torch.Tensor, experts: torch.Tensor, weight: GroupedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """Rows of x times the weights of their experts.

    Raises:
        IndexError: an id is out of range. Nothing but the ids has been read then: they are counted first.
    """
    assert NATIVE is not None
    count, rows, _ = weight.shape
    out = x.new_empty((x.shape[0], rows))
    found: bool = NATIVE.expert_linear(
        *arguments(weight),
        x.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        FLOAT_TYPES[x.dtype],
        torch.get_num_threads(),
        experts.data_ptr(),
        count,
    )
    if not found:
        raise IndexError(f"an expert id is not one of 0 to {count - 1}")
    return out
