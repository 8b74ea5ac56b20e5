"""Registers the native kernels with the ops. Imported before the kernels in plain torch, so that it is asked first."""

from typing import Any

import torch

from quanto_hf.ops.cpu.call import native_dequantize, native_linear
from quanto_hf.ops.cpu.library import NATIVE, REASON
from quanto_hf.ops.cpu.selfcheck import GEMV_ROWS, why_wrong
from quanto_hf.ops.dequantize import block_rows, dequantize
from quanto_hf.ops.linear import linear_grad_input, linear_op
from quanto_hf.ops.scratch import scratch
from quanto_hf.ops.watched import watched
from quanto_hf.qtypes import QTYPES


def refuses_weight(
    packed: Any, scale: Any, zero: Any, qtype: str, group_size: int, dtype: Any, many: bool
) -> str | None:
    """Why no native kernel takes this weight, or None."""
    if NATIVE is None:
        return REASON
    if not on_cpu(packed, scale, zero):
        return "it runs on CPU only"
    if QTYPES[qtype].native is None:
        return f"there is no native code for {qtype} weights"
    if watched():
        return "torch follows every operator here: a dispatch mode, a transform or a trace is active"
    return why_wrong(NATIVE.level(), qtype, group_size, zero is not None, scale.dtype, dtype, many)


def on_cpu(*tensors: Any) -> bool:
    """Whether all of them, None aside, are in the memory of the CPU."""
    return all(tensor is None or tensor.is_cpu for tensor in tensors)


def _linear_refuses(x: Any, packed: Any, scale: Any, zero: Any, bias: Any, qtype: str, group_size: int) -> str | None:
    if not x.numel() or not packed.numel():
        return "there is nothing to multiply"
    if not on_cpu(x, bias):
        return "it runs on CPU only"
    many = x.numel() > GEMV_ROWS * x.shape[-1]
    return refuses_weight(packed, scale, zero, qtype, group_size, x.dtype, many)


@linear_op.kernel("native", _linear_refuses)
def _linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    qtype: str,
    group_size: int,
) -> torch.Tensor:
    """The weight is decoded in registers, or in panels that stay in the cache (csrc/gemv*.h, csrc/gemm*.h)."""
    return native_linear(plain(x), plain(packed), plain(scale), optional(zero), optional(bias), qtype, group_size)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous memory that holds the values as they are."""
    return tensor.contiguous().resolve_neg()


def optional(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """:func:`plain`, or None."""
    return None if tensor is None else plain(tensor)


def _dequantize_refuses(
    packed: Any, scale: Any, zero: Any, qtype: str, group_size: int, columns: int, dtype: Any
) -> str | None:
    if not packed.numel():
        return "there is nothing to dequantize"
    return refuses_weight(packed, scale, zero, qtype, group_size, dtype, False)


@dequantize.kernel("native", _dequantize_refuses)
def _dequantize(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    qtype: str,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """One pass over the codes."""
    out = scale.new_empty((packed.shape[0], in_features), dtype=dtype)
    return native_dequantize(plain(packed), plain(scale), optional(zero), qtype, group_size, out)


def _grad_refuses(
    grad: Any, packed: Any, scale: Any, zero: Any, qtype: str, group_size: int, columns: int
) -> str | None:
    if not grad.numel() or not packed.numel():
        return "there is nothing to multiply"
    if not on_cpu(grad):
        return "it runs on CPU only"
    return refuses_weight(packed, scale, zero, qtype, group_size, grad.dtype, False)


@linear_grad_input.kernel("native_blocks", _grad_refuses)
def _grad_input(
    grad: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    qtype: str,
    group_size: int,
    in_features: int,
) -> torch.Tensor:
    """A block of rows is dequantized natively and multiplied by torch; rows are what this product wants as they are.

    The sum over blocks is kept in float32.
    """
    flat = grad.reshape(-1, grad.shape[-1])
    packed, scale, zero = plain(packed), plain(scale), optional(zero)
    total = flat.new_zeros((flat.shape[0], in_features), dtype=torch.float32)
    step = block_rows(in_features, grad.dtype)
    for start in range(0, packed.shape[0], step):
        cut = slice(start, min(start + step, packed.shape[0]))
        weight = scratch("weight", (cut.stop - start, in_features), grad.dtype, grad.device)
        native_dequantize(packed[cut], scale[cut], None if zero is None else zero[cut], qtype, group_size, weight)
        total += flat[:, cut] @ weight
    return total.to(grad.dtype).view(*grad.shape[:-1], in_features)
