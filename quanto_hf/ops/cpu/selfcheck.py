"""Each kernel shows once, before its first use, that it agrees with the reference on this machine.

A class of calls (number type, grouping, dtype of x, few or many rows) is checked on a small random weight with
awkward sizes. A kernel that disagrees is reported loudly and never used again in this process: wrong fast kernels are
what people remember of other quantizers.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from quanto_hf.ops.cpu.call import native_dequantize, native_expert_linear, native_linear
from quanto_hf.ops.cpu.library import NATIVE
from quanto_hf.ops.dequantize import dequantize, groups
from quanto_hf.ops.packing import pack
from quanto_hf.qtypes import QTYPES

# csrc/common.h: more rows of x go through another kernel.
GEMV_ROWS = 8
# Largest |difference| / largest |weight|, in float32.
WEIGHT_TOLERANCE = 1e-6
# Largest |difference| / (|x| @ |weight|): rounding of the weight and of the result in the dtype of x. All kernels of
# all levels stay below 60 % of these.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 2e-3}


def sample(qtype: str, group_size: int, asymmetric: bool, rows: int, columns: int) -> tuple[torch.Tensor, ...]:
    """packed, scale and, if asymmetric, zero of a random weight."""
    kind = QTYPES[qtype]
    generator = torch.Generator().manual_seed(rows * columns)
    low = int(kind.qmin) if kind.storage is torch.int8 else 0
    high = low + kind.levels if kind.kind != "float" else 0x78
    codes = torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int64).to(kind.storage)
    if kind.kind == "float":  # the sign is the highest bit
        codes[:, ::2] |= 0x80
    shape = (rows, groups(columns, group_size))
    scale = (torch.rand(shape, generator=generator, dtype=torch.float32) + 0.5) / kind.qmax
    scale = scale.to(torch.bfloat16) if group_size > 0 else scale
    zero = (torch.rand(shape, generator=generator, dtype=torch.float32) * kind.levels + min(kind.qmin, 0)).to(
        scale.dtype
    )
    tensors = (pack(codes, kind.bits), scale)
    return (*tensors, zero) if asymmetric else tensors


@contextmanager
def undisturbed() -> Iterator[None]:
    """The first call may stand under autocast, or another default device. Another default dtype, which belongs to the
    whole process, cannot be put aside here: whatever is made for a check names its dtype."""
    with torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.no_grad():
        yield


@undisturbed()
def errors(
    qtype: str, group_size: int, asymmetric: bool, scale_dtype: torch.dtype, dtype: torch.dtype, many: bool
) -> tuple[float, float]:
    """How far the native kernels are off the reference: dequantize, over the largest weight, and linear, over
    |x| @ |weight|. Infinite or NaN where a kernel makes such numbers.

    Args:
        many: whether x has more than ``GEMV_ROWS`` rows.
    """
    # blocks of 256 columns at most: two whole ones, and a short one, with a short group
    columns = 560 + (2 * group_size if 0 < group_size <= 512 else 0)
    packed, scale, *rest = sample(qtype, group_size, asymmetric, 37, columns)
    scale, zero = scale.to(scale_dtype), rest[0].to(scale_dtype) if rest else None
    inputs = torch.randn(
        2 * GEMV_ROWS + 3, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float32
    ).to(dtype)
    bias = torch.ones(37, dtype=dtype)
    weight = dequantize.reference(packed, scale, zero, qtype, group_size, columns, torch.float32)
    made = native_dequantize(packed, scale, zero, qtype, group_size, torch.empty_like(weight))
    error, chosen = 0.0, torch.tensor([36, 0, 5, 5], dtype=torch.int64)
    some = native_dequantize(packed, scale, zero, qtype, group_size, weight.new_empty(4, columns), chosen)
    worst = max(float((made - weight).abs().max()), float((some - weight[chosen]).abs().max()))
    for x in (inputs,) if many else (inputs[:1], inputs[:3]):  # one row has kernels of its own
        got = native_linear(x, packed, scale, zero, bias, qtype, group_size).float()
        size = x.float().abs() @ weight.abs().T + 1
        exact = x.float() @ weight.T + 1
        error = max(error, float(((got - exact).abs() / size).nan_to_num(nan=torch.inf).max()))
    return worst / float(weight.abs().max()), error


@cache
@undisturbed()
def why_wrong(
    level: str, qtype: str, group_size: int, asymmetric: bool, scale_dtype: torch.dtype, dtype: torch.dtype, many: bool
) -> str | None:
    """None if the native kernels agree with the reference for such calls, else the sentence that says how they fail.

    Args:
        level: the instructions in use (results are kept per level).
        many: whether x has more than ``GEMV_ROWS`` rows.
    """
    assert NATIVE is not None and NATIVE.level() == level
    weight_error, error = errors(qtype, group_size, asymmetric, scale_dtype, dtype, many)
    if weight_error <= WEIGHT_TOLERANCE and error <= TOLERANCE[dtype]:
        return None
    if not weight_error <= WEIGHT_TOLERANCE:
        error = weight_error
    return report(f"{level} kernel for {qtype} weights with group_size {group_size}", error)


@cache
@undisturbed()
def why_experts_wrong(level: str) -> str | None:
    """The same for the order of the rows of experts; the product is that of ``linear``, to the bit."""
    assert NATIVE is not None and NATIVE.level() == level
    packed, scale, zero = (t.view(4, 5, -1) for t in sample("int4", 32, True, 20, 200))
    rows = 4 * GEMV_ROWS
    # expert 2 has no rows, expert 0 more than the kernels for few rows take
    mixed = (
        (torch.arange(rows, dtype=torch.int64) * 7 % rows % 5)
        .clamp(max=3)
        .masked_fill(torch.arange(rows, dtype=torch.int64) % 5 == 2, 0)
    )
    error = 0.0
    for experts in (mixed, mixed.sort().values, mixed[:3]):
        for dtype in (torch.float32, torch.bfloat16):
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(len(experts), 200, generator=generator, dtype=torch.float32).to(dtype)
            bias = torch.randn(4, 5, generator=generator, dtype=torch.float32).to(dtype)
            got = native_expert_linear(x, experts, packed, scale, zero, bias, "int4", 32)
            for e in experts.unique().tolist():
                mine = experts == e
                alone = native_linear(x[mine], packed[e], scale[e], zero[e], bias[e], "int4", 32)
                error = max(error, float((got[mine].float() - alone.float()).abs().nan_to_num(nan=torch.inf).max()))
    return None if error == 0.0 else report(f"{level} kernel for experts", error)


def report(what: str, error: float) -> str:
    """Warn that a kernel is wrong, and give the sentence."""
    sentence = (
        f"the native {what} disagrees with the reference (error {error:.2g}) on this machine; slower kernels are used "
        "instead. Please report this with the output of `quanto-hf kernels`."
    )
    warnings.warn(sentence, RuntimeWarning, stacklevel=4)
    return sentence
