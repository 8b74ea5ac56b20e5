"""Registers the native kernels of the AQLM ops (csrc/aqlm*.h), each of which is checked once before its first use."""

from functools import cache
from typing import Any

import torch

from quanto_hf.ops.aqlm import (
    aqlm_dequantize_op,
    aqlm_linear_grad_input,
    aqlm_linear_op,
    code_dtype,
    features,
)
from quanto_hf.ops.cpu.call import FLOAT_TYPES, THREAD_VALUES
from quanto_hf.ops.cpu.kernels import on_cpu, optional, plain
from quanto_hf.ops.cpu.library import NATIVE, REASON
from quanto_hf.ops.cpu.selfcheck import GEMV_ROWS, TOLERANCE, WEIGHT_TOLERANCE, report, undisturbed
from quanto_hf.ops.dequantize import block_rows
from quanto_hf.ops.scratch import scratch
from quanto_hf.ops.watched import watched

# csrc/aqlm.h: one row of x may go through tables of products, so may three with one codebook, and five are multiplied
# with each row of the weight. Above GEMV_ROWS there are panels; csrc/gemm.h multiplies the last tile of x another way.
FEW_ROWS, MANY_ROWS = (1, 3, 5), (GEMV_ROWS + 1, 2 * GEMV_ROWS + 3)
# One codebook, two, and more are decoded differently.
KNOWN_COUNTS = 3


def aqlm_arguments(codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor) -> tuple[int, ...]:
    """A weight as csrc/module.cpp reads it; the tensors are contiguous and outlive the call."""
    count, size, out_group, in_group = codebooks.shape
    return (
        codes.data_ptr(),
        codebooks.data_ptr(),
        scales.data_ptr(),
        *features(codes, codebooks),
        count,
        out_group,
        in_group,
        size.bit_length() - 1,
        codes.dtype.itemsize,
        FLOAT_TYPES[codebooks.dtype],
        FLOAT_TYPES[scales.dtype],
    )


def native_aqlm_dequantize(
    codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Dequantize into ``out``; every tensor is contiguous and on the CPU."""
    assert NATIVE is not None
    threads = min(torch.get_num_threads(), 1 + out.numel() // THREAD_VALUES)
    NATIVE.aqlm_dequantize(*aqlm_arguments(codes, codebooks, scales), out.data_ptr(), FLOAT_TYPES[out.dtype], threads)
    return out


def native_aqlm_linear(
    x: torch.Tensor, codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``x @ weight.T + bias``; every tensor is contiguous and on the CPU."""
    assert NATIVE is not None
    weight = aqlm_arguments(codes, codebooks, scales)
    rows, columns = weight[3:5]
    out = x.new_empty((*x.shape[:-1], rows))
    NATIVE.aqlm_linear(
        *weight,
        x.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        x.numel() // columns,
        FLOAT_TYPES[x.dtype],
        torch.get_num_threads(),
    )
    return out


# ----------------------------------------------------------------------------------------------- the check before use


@undisturbed()
def aqlm_errors(
    count: int, nbits: int, book_dtype: torch.dtype, dtype: torch.dtype, out_group: int, in_group: int, many: bool
) -> tuple[float, float]:
    """How far the native kernels are off the reference: dequantize, over the largest weight, and linear, over
    |x| @ |weight|; on a random weight with awkward sizes."""
    generator = torch.Generator().manual_seed(nbits)
    groups, lines = 560 // in_group + 3, 37
    kind = code_dtype(nbits)
    low, high = torch.iinfo(kind).min, torch.iinfo(kind).max + 1
    codes = torch.randint(low, high, (lines, groups, count), generator=generator, dtype=torch.int64).to(kind)
    books = (torch.rand((count, 1 << nbits, out_group, in_group), generator=generator, dtype=torch.float32) - 0.5).to(
        book_dtype
    )
    scales = (torch.rand((lines, 1, 1, 1), generator=generator, dtype=torch.float32) + 0.5).to(book_dtype)
    weight = aqlm_dequantize_op.reference(codes, books, scales, torch.float32)
    made = native_aqlm_dequantize(codes, books, scales, torch.empty_like(weight))
    worst = float((made - weight).abs().max()) / float(weight.abs().max())
    inputs = torch.randn((MANY_ROWS[-1], weight.shape[1]), generator=generator, dtype=torch.float32).to(dtype)
    bias = torch.ones(weight.shape[0], dtype=dtype)
    error = 0.0
    for x in [inputs[:rows] for rows in (MANY_ROWS if many else FEW_ROWS)]:
        got = native_aqlm_linear(x, codes, books, scales, bias).float()
        size, exact = x.float().abs() @ weight.abs().T + 1, x.float() @ weight.T + 1
        error = max(error, float(((got - exact).abs() / size).nan_to_num(nan=torch.inf).max()))
    return worst, error


@cache
@undisturbed()
def why_aqlm_wrong(
    level: str,
    count: int,
    nbits: int,
    book_dtype: torch.dtype,
    dtype: torch.dtype,
    out_group: int,
    in_group: int,
    many: bool,
) -> str | None:
    """None if the native kernels agree with the reference for such calls, else the sentence that says how they fail."""
    assert NATIVE is not None and NATIVE.level() == level
    weight_error, error = aqlm_errors(count, nbits, book_dtype, dtype, out_group, in_group, many)
    if weight_error <= WEIGHT_TOLERANCE and error <= TOLERANCE[dtype]:
        return None
    if not weight_error <= WEIGHT_TOLERANCE:
        error = weight_error
    return report(f"{level} kernel for AQLM weights of {nbits} bits and {out_group} x {in_group} values", error)


# --------------------------------------------------------------------------------------------------------- the kernels


def refuses_aqlm(codes: Any, codebooks: Any, scales: Any, dtype: Any, many: bool) -> str | None:
    """Why no native kernel takes this weight, or None.

    Args:
        many: whether x has more than ``GEMV_ROWS`` rows.
    """
    if NATIVE is None:
        return REASON
    if not NATIVE.has_kernel("aqlm_linear"):
        return f"level {NATIVE.level()} has no kernel for AQLM weights"
    if not on_cpu(codes, codebooks, scales):
        return "it runs on CPU only"
    if watched():
        return "torch follows every operator here: a dispatch mode, a transform or a trace is active"
    return why_aqlm_wrong(NATIVE.level(), *check_of(codebooks), dtype, *codebooks.shape[2:], many)


def check_of(codebooks: torch.Tensor) -> tuple[int, int, torch.dtype]:
    """Codebooks, bits and dtype of the check that speaks for such codebooks."""
    nbits = codebooks.shape[1].bit_length() - 1
    # more bits than 16 are read by the same code, and the tables of the check would be large
    return min(codebooks.shape[0], KNOWN_COUNTS), nbits if nbits <= 16 else 17, codebooks.dtype


def _dequantize_refuses(codes: Any, codebooks: Any, scales: Any, dtype: Any) -> str | None:
    if not codes.numel():
        return "there is nothing to dequantize"
    return refuses_aqlm(codes, codebooks, scales, dtype, False)


@aqlm_dequantize_op.kernel("native", _dequantize_refuses)
def _dequantize(codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Entries are gathered and added, a chunk of a row at a time."""
    out = codebooks.new_empty(features(codes, codebooks), dtype=dtype)
    return native_aqlm_dequantize(plain(codes), plain(codebooks), plain(scales), out)


def _linear_refuses(x: Any, codes: Any, codebooks: Any, scales: Any, bias: Any) -> str | None:
    if not x.numel() or not codes.numel():
        return "there is nothing to multiply"
    if not on_cpu(x, bias):
        return "it runs on CPU only"
    return refuses_aqlm(codes, codebooks, scales, x.dtype, x.numel() > GEMV_ROWS * x.shape[-1])


@aqlm_linear_op.kernel("native", _linear_refuses)
def _linear(
    x: torch.Tensor, codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Tables of products for codes of 8 bits and a row of x, else rows or panels of the decoded weight."""
    return native_aqlm_linear(plain(x), plain(codes), plain(codebooks), plain(scales), optional(bias))


def _grad_refuses(grad: Any, codes: Any, codebooks: Any, scales: Any) -> str | None:
    if not grad.numel() or not codes.numel():
        return "there is nothing to multiply"
    if not on_cpu(grad):
        return "it runs on CPU only"
    return refuses_aqlm(codes, codebooks, scales, grad.dtype, False)


@aqlm_linear_grad_input.kernel("native_blocks", _grad_refuses)
def _grad_input(grad: torch.Tensor, codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """A block of rows is dequantized natively and multiplied by torch; the sum over blocks is kept in float32."""
    rows, columns = features(codes, codebooks)
    flat = grad.reshape(-1, rows)
    codes, codebooks, scales = plain(codes), plain(codebooks), plain(scales)
    total = flat.new_zeros((flat.shape[0], columns), dtype=torch.float32)
    out_group = codebooks.shape[2]
    step = max(1, block_rows(columns, grad.dtype) // out_group)
    for start in range(0, codes.shape[0], step):
        cut = slice(start, min(start + step, codes.shape[0]))
        weight = scratch("weight", ((cut.stop - start) * out_group, columns), grad.dtype, grad.device)
        native_aqlm_dequantize(codes[cut], codebooks, scales[cut], weight)
        total += flat[:, start * out_group : cut.stop * out_group] @ weight
    return total.to(grad.dtype).view(*grad.shape[:-1], columns)
