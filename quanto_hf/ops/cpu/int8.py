"""Which products with int8 activations the native library computes, and the check of each kind before its first use."""

from functools import cache

import torch

from quanto_hf.ops.activation import activation_group, round_activations
from quanto_hf.ops.cpu.call import linear_name, native_linear
from quanto_hf.ops.cpu.library import NATIVE, REASON
from quanto_hf.ops.cpu.selfcheck import GEMV_ROWS, TOLERANCE, report, sample, undisturbed
from quanto_hf.ops.dequantize import dequantize, groups
from quanto_hf.qtypes import QTYPES

# csrc/int8.h: sums of more columns could leave int32. With groups of columns there is no limit.
MAX_INT8_COLUMNS = 65536
# csrc/int8_groups.h: groups of the weight and the 32 columns of x that share a scale must fit into each other.
GROUP_STEP = 16


def refuses_int8(qtype: str, group_size: int, asymmetric: bool, in_features: int, activations: str) -> str | None:
    """Why there is no kernel for such weights and activations at the level in use, or None."""
    if NATIVE is None:
        return REASON
    if activations != "int8":
        return f"there are kernels for int8 activations, not for {activations}"
    if qtype not in ("int8", "int4", "int2"):
        return f"there are kernels for int8, int4 and int2 weights, not for {qtype}"
    if not NATIVE.has_kernel(linear_name(qtype, activations)):
        return f"level {NATIVE.level()} has no product of {qtype} and int8"
    whole_rows = groups(in_features, group_size) == 1
    if qtype != "int8":
        if whole_rows or group_size % GROUP_STEP == 0:
            return None
        return f"groups of the weight must be a multiple of {GROUP_STEP} columns, or whole rows"
    if asymmetric or not whole_rows:
        return "int8 weights need one scale per row and no zero"
    if in_features > MAX_INT8_COLUMNS:
        return f"sums of more than {MAX_INT8_COLUMNS} columns could leave int32"
    return None


def why_not_int8(
    qtype: str,
    group_size: int,
    asymmetric: bool,
    scale_dtype: torch.dtype,
    in_features: int,
    dtype: torch.dtype,
    many: bool,
    activations: str,
) -> str | None:
    """Why x is rounded on its own and multiplied by another kernel, or None: one native kernel does both."""
    reason = refuses_int8(qtype, group_size, asymmetric, in_features, activations)
    if reason is not None or NATIVE is None:
        return reason
    return why_int8_wrong(NATIVE.level(), qtype, group_size, asymmetric, scale_dtype, dtype, many)


@undisturbed()
def int8_error(
    qtype: str, group_size: int, asymmetric: bool, scale_dtype: torch.dtype, dtype: torch.dtype, many: bool
) -> float:
    """How far the native product with int8 activations is off the one of the definition, over |x| @ |weight|, with
    scales found from x and with a given one. Infinite where a kernel makes NaN.

    Args:
        many: whether x has more than ``GEMV_ROWS`` rows.
    """
    # blocks of 256 columns at most: two whole ones, and a short one, with a short group
    columns = 600 + (2 * group_size if 0 < group_size <= 512 else 0)
    if qtype == "int8" and group_size > 0:
        # there is a kernel for rows of a single group only
        columns = group_size
    packed, scale, *rest = sample(qtype, group_size, asymmetric, 37, columns)
    scale, zero = scale.to(scale_dtype), rest[0].to(scale_dtype) if rest else None
    inputs = torch.randn(
        2 * GEMV_ROWS + 3, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float32
    ).to(dtype)
    weight = dequantize.reference(packed, scale, zero, qtype, group_size, columns, torch.float32)
    size, group = inputs.float().abs() @ weight.abs().T, activation_group(QTYPES[qtype], QTYPES["int8"])
    error, stored = 0.0, (packed, scale, zero, None, qtype, group_size)
    # 2 / 127 cuts one number in twenty
    for x_scale in (None, torch.tensor(2 / 127, dtype=torch.float32)):
        exact = round_activations(inputs, QTYPES["int8"], group, x_scale) @ weight.T
        for rows in (2 * GEMV_ROWS + 3,) if many else (1, 3):
            got = native_linear(inputs[:rows], *stored, activations="int8", x_scale=x_scale).float()
            error = max(error, float(((got - exact[:rows]).abs() / size[:rows]).nan_to_num(nan=torch.inf).max()))
    return error


@cache
def why_int8_wrong(
    level: str, qtype: str, group_size: int, asymmetric: bool, scale_dtype: torch.dtype, dtype: torch.dtype, many: bool
) -> str | None:
    """None if the native product with int8 activations agrees with the definition for such calls, else the sentence
    that says how it fails.

    Args:
        level: the instructions in use (results are kept per level).
        many: whether x has more than ``GEMV_ROWS`` rows.
    """
    assert NATIVE is not None and NATIVE.level() == level
    error = int8_error(qtype, group_size, asymmetric, scale_dtype, dtype, many)
    if error <= TOLERANCE[dtype]:
        return None
    return report(f"{level} kernel for {qtype} weights with group_size {group_size} and int8 activations", error)
