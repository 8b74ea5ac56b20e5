"""Registers the native kernels of products and of ``dequantize``, for weights of every kind."""

from collections.abc import Callable
from typing import Any

import torch

from quanto_hf.ops.cpu.call import (
    FLOAT_TYPES,
    arguments,
    linear_name,
    native_dequantize,
    native_linear,
    scale_argument,
)
from quanto_hf.ops.cpu.library import NATIVE, REASON, label
from quanto_hf.ops.dequantize import dequantize_op
from quanto_hf.ops.grouped_weight import block_rows, groups
from quanto_hf.ops.kernel import Call
from quanto_hf.ops.linear import linear_grad_input, linear_op
from quanto_hf.ops.linear_rounded import linear_rounded_op
from quanto_hf.ops.scratch import scratch
from quanto_hf.ops.selfcheck import FEW_ROWS
from quanto_hf.ops.watched import watched
from quanto_hf.ops.weight import GroupedWeight, Weight

# csrc/int8.h: sums of more columns could leave int32. With groups of columns there is no limit.
MAX_INT8_COLUMNS = 65536
# csrc/int8_groups.h: groups of the weight and the 32 columns of x that share a scale must fit into each other.
GROUP_STEP = 16


def refuses_weight(weight: Weight) -> str | None:
    """Why no native kernel takes this weight, or None."""
    if NATIVE is None:
        return REASON
    if not weight.has_native_code:
        return f"there is no native code for {weight.what} weights"
    # every level has the one of weights with groups
    if (name := linear_name(weight)) != "linear" and not NATIVE.has_kernel(name):
        return f"level {NATIVE.level()} has no kernel for {weight.what} weights"
    if watched():
        return "torch follows every operator here: a dispatch mode, a transform or a trace is active"
    return None


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous memory that holds the values as they are."""
    return tensor.contiguous().resolve_neg()


def optional(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """:func:`plain`, or None."""
    return None if tensor is None else plain(tensor)


def lies_in_memory(weight: Weight) -> bool:
    """Whether nothing of it has to be copied first."""
    return all(t is None or (t.is_contiguous() and not t.is_neg()) for t in weight.stored)


# ---------------------------------------------------------------------------------------------------------- linear


def _supports(x: Any, weight: Weight, *rest: Any) -> str | None:
    if not x.numel() or not 0 < weight.shape[0]:
        return "there is nothing to multiply"
    return refuses_weight(weight)


def bound_product(
    refuses: Callable[..., str | None], weight: Weight, activations: str | None = None, *scale: torch.Tensor | None
) -> Call | None:
    """``call(x, bias)`` for this weight."""
    if refuses_weight(weight) is not None:
        return None
    at, (rows, columns) = arguments(weight), weight.shape
    bias_shape = torch.Size((rows,))
    run, threads, types = getattr(NATIVE, linear_name(weight, activations)), torch.get_num_threads, FLOAT_TYPES
    more = scale_argument(activations, scale[0] if scale else None)
    rest = () if activations is None else (activations, *scale)
    trusted: set[tuple[torch.dtype, bool]] = set()

    def call(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        shape, dtype = x.shape, x.dtype
        kind = types.get(dtype)
        if kind is None or not shape or shape[-1] != columns:
            return None
        if bias is not None and (bias.dtype is not dtype or bias.shape != bias_shape):
            return None
        count = x.numel() // columns
        if not count:
            return None
        key = (dtype, count > FEW_ROWS)
        if key not in trusted:
            if refuses(x, weight, bias, *rest):
                return None
            trusted.add(key)
        # a slice of a torch.Size takes 0.1 us more
        size = [*shape]
        size[-1] = rows
        # not torch.empty, which looks at the default device
        out = x.new_empty(size)
        bias_at = 0 if bias is None else bias.data_ptr()
        run(*at, x.data_ptr(), bias_at, out.data_ptr(), count, kind, threads(), *more)
        return out

    return call


@linear_op.kernel("native", _supports, device="cpu", bind=bound_product, label=label)
def _linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """The weight is decoded in registers, or in panels that stay in the cache (csrc/gemv*.h, csrc/gemm*.h). Of codes of
    8 bits in codebooks there are tables of products for few rows of x (csrc/aqlm*.h)."""
    return native_linear(plain(x), weight.map(plain), optional(bias))


def refuses_int8(weight: Weight, activations: str) -> str | None:
    """Why there is no kernel for such weights and activations at the level in use, or None."""
    if (said := refuses_weight(weight)) is not None or NATIVE is None:
        return said
    if activations != "int8":
        return f"there are kernels for int8 activations, not for {activations}"
    if not isinstance(weight, GroupedWeight) or weight.qtype not in ("int8", "int4", "int2"):
        return f"there are kernels for int8, int4 and int2 weights, not for {weight.what}"
    if not NATIVE.has_kernel(linear_name(weight, activations)):
        return f"level {NATIVE.level()} has no product of {weight.qtype} and int8"
    whole_rows = groups(weight.in_features, weight.group_size) == 1
    if weight.qtype != "int8":
        if whole_rows or weight.group_size % GROUP_STEP == 0:
            return None
        return f"groups of the weight must be a multiple of {GROUP_STEP} columns, or whole rows"
    if weight.zero is not None or not whole_rows:
        return "int8 weights need one scale per row and no zero"
    if weight.in_features > MAX_INT8_COLUMNS:
        return f"sums of more than {MAX_INT8_COLUMNS} columns could leave int32"
    return None


def _supports_int8(x: Any, weight: Weight, bias: Any, activations: str, x_scale: Any) -> str | None:
    if x_scale is not None and not x_scale.is_cpu:
        return "it runs on CPU only"
    # what is rounded on its own is rounded to the dtype of x as well, which a copy must not decide about
    if type(x) is not torch.Tensor or not all(t is None or (t.is_contiguous() and not t.is_neg()) for t in (x, bias)):
        return "x, or the bias, does not lie in memory as it is"
    return _supports(x, weight) or refuses_int8(weight, activations)


def _bound_int8(
    refuses: Callable[..., str | None], weight: Weight, activations: str, x_scale: torch.Tensor | None
) -> Call | None:
    if refuses_int8(weight, activations) is not None:
        return None
    return bound_product(refuses, weight, activations, x_scale)


@linear_rounded_op.kernel("native_int8", _supports_int8, device="cpu", bind=_bound_int8, label=label)
def _linear_int8(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, activations: str, x_scale: torch.Tensor | None
) -> torch.Tensor:
    """x is rounded and multiplied in one (csrc/int8*.h)."""
    return native_linear(plain(x), weight.map(plain), optional(bias), activations, optional(x_scale))


# ------------------------------------------------------------------------------------------------------ dequantize


def _dequantize_supports(weight: Weight, dtype: torch.dtype) -> str | None:
    if not weight.shape[0] or not weight.shape[1]:
        return "there is nothing to dequantize"
    return refuses_weight(weight)


@dequantize_op.kernel("native", _dequantize_supports, device="cpu", label=label)
def _dequantize(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """One pass over the codes."""
    scale = weight.stored[1]
    assert scale is not None
    return native_dequantize(weight.map(plain), scale.new_empty(weight.shape, dtype=dtype))


@linear_grad_input.kernel("native_blocks", _supports, device="cpu", label=label)
def _grad_input(grad: torch.Tensor, weight: Weight) -> torch.Tensor:
    """A block of rows is dequantized natively and multiplied by torch; rows are what this product wants as they are.

    The sum over blocks is kept in float32.
    """
    weight = weight.map(plain)
    rows, columns = weight.shape
    flat = grad.reshape(-1, rows)
    total = flat.new_zeros((flat.shape[0], columns), dtype=torch.float32)
    # rows that share a code stay together
    group = 1 if isinstance(weight, GroupedWeight) else weight.codebooks.shape[2]
    step = max(1, block_rows(columns, grad.dtype) // group)
    for start in range(0, rows // group, step):
        part = weight.rows(slice(start, start + step))
        block = scratch("weight", part.shape, grad.dtype, grad.device)
        native_dequantize(part, block)
        total += flat[:, start * group : start * group + part.shape[0]] @ block
    return total.to(grad.dtype).view(*grad.shape[:-1], columns)
