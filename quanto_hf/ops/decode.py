"""Codes to the numbers that they stand for, without scale: the definition, and a fast way for each number type."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from quanto_hf.ops.packing import BLOCK_BYTES, unpack
from quanto_hf.ops.scratch import scratch
from quanto_hf.ops.watched import untraced, watched
from quanto_hf.qtypes import QType

# bfloat16 has 8 bits of exponent and 7 of mantissa. Put the exponent and mantissa of a small float at the same place
# and what is missing is a power of two, the difference of the two exponent biases: 127 - 7, 127 - 15, 127 - 1.
# Name -> bits to shift by, mask without the sign, factor.
_BF16_TRICK = {
    "float8_e4m3fn": (4, 0x7F0, 2.0**120),
    "float8_e5m2": (5, 0xFE0, 2.0**112),
    "fp4": (2, 0x1C0, 2.0**126),
}


def decode_reference(packed: torch.Tensor, qtype: QType, n: int) -> torch.Tensor:
    """The definition: float32 numbers, shape (..., n), that the packed codes stand for."""
    codes = unpack(packed, qtype.bits, n)
    if qtype.kind == "int":
        return codes.float()
    # looked up, since a trace cannot hold a view as another dtype; the table goes where the codes are, also in a trace
    # that is loaded for another device
    table = _numbers(qtype).to(codes.narrow(-1, 0, 0).float())
    return table.index_select(0, codes.flatten().int()).view_as(codes)


def decode(packed: torch.Tensor, qtype: QType, out: torch.Tensor) -> torch.Tensor:
    """The same numbers written to ``out``, a contiguous float32, bfloat16 or float16 tensor of shape (rows, n).

    Every number of every type but nf4, whose table is rounded, is exact in bfloat16 and in float16.
    """
    if qtype.name in _BF16_TRICK and qtype.kind == "float":
        return _decode_float8(packed, qtype, out)
    if qtype.kind == "float":
        return out.copy_(decode_reference(packed, qtype, out.shape[-1]))
    if qtype.kind == "table":
        return _decode_table(packed, qtype, out)
    if not qtype.is_packed:
        return out.copy_(packed)
    return out.copy_(unpack(packed, qtype.bits, out.shape[-1], scratch("codes", out.shape, torch.uint8, out.device)))


def _decode_float8(packed: torch.Tensor, qtype: QType, out: torch.Tensor) -> torch.Tensor:
    # Bit arithmetic in place of torch's cast, which is 10 times slower. int8 -> int16 extends the sign to bit 15.
    shift, mask, factor = _BF16_TRICK[qtype.name]
    numbers = out if out.dtype is torch.bfloat16 else scratch("float8", out.shape, torch.bfloat16, out.device)
    bits = numbers.view(torch.int16)
    bits.copy_(packed.view(torch.int8))
    bits.bitwise_left_shift_(shift).bitwise_and_(mask - 0x8000)
    numbers.mul_(factor)
    return out if numbers is out else out.copy_(numbers)


def _decode_table(packed: torch.Tensor, qtype: QType, out: torch.Tensor) -> torch.Tensor:
    rows, columns = out.shape
    blocks, rest = divmod(columns, 2 * BLOCK_BYTES)
    if qtype.bits == 4 and out.dtype is torch.bfloat16 and rows and blocks and not rest and packed.is_contiguous():
        blocked = packed.view(rows, blocks, BLOCK_BYTES)
        return _decode_fp4(blocked, out) if qtype.name == "fp4" else _decode_byte_pairs(blocked, qtype, out)
    codes = unpack(packed, qtype.bits, columns, scratch("codes", out.shape, torch.uint8, out.device))
    index = scratch("index", out.shape, torch.int32, out.device).copy_(codes)
    torch.index_select(_table(qtype, out.dtype, out.device), 0, index.view(-1), out=out.view(-1))
    return out


def _decode_fp4(packed: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Bit arithmetic as for float8: a nibble at the top of an int8 has its sign extended by the cast to int16."""
    planes = out.view(*packed.shape[:2], 2, BLOCK_BYTES).view(torch.int16)
    nibbles = scratch("codes", tuple(packed.shape), torch.uint8, out.device)
    planes[:, :, 0].copy_(torch.bitwise_left_shift(packed, 4, out=nibbles).view(torch.int8))
    planes[:, :, 1].copy_(torch.bitwise_and(packed, 0xF0, out=nibbles).view(torch.int8))
    shift, mask, factor = _BF16_TRICK["fp4"]
    planes.bitwise_left_shift_(shift).bitwise_and_(mask - 0x8000)
    return out.mul_(factor)


def _decode_byte_pairs(packed: torch.Tensor, qtype: QType, out: torch.Tensor) -> torch.Tensor:
    """Four 4-bit codes per lookup: 2 times as fast as one by one (4096 x 4096: 6 ms and 12 ms)."""
    pairs = packed.view(torch.int16)
    index = scratch("index", tuple(pairs.shape), torch.int32, out.device).copy_(pairs).add_(1 << 15)
    found = scratch("found", tuple(pairs.shape), torch.int64, out.device)
    torch.index_select(_pair_table(qtype, out.device), 0, index.view(-1), out=found.view(-1))
    # two neighbouring numbers of the low plane, then two of the high one; two bfloat16 are an int32
    halves = found.view(torch.int32).view(*pairs.shape, 2)
    planes = out.view(*pairs.shape[:2], 2, BLOCK_BYTES).view(torch.int32)
    for plane in (0, 1):
        planes[:, :, plane].copy_(halves[..., plane])
    return out


def _kept(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Tables are made once, but not where a mode or a transform would make them of its own kind of tensor."""
    kept = cache(make)

    def made(*args: Any) -> torch.Tensor:
        # a constant of a trace, which sees no part of it
        with untraced():
            return make(*args) if watched() else kept(*args)

    return made


@_kept
def _pair_table(qtype: QType, device: torch.device) -> torch.Tensor:
    """For each pair of packed bytes, read as an int16 plus 32768, the four bfloat16 numbers of its codes."""
    with torch.inference_mode(False):
        pair = torch.arange(1 << 16, dtype=torch.int64, device="cpu") ^ (1 << 15)
        first, second = pair & 0xFF, pair >> 8
        codes = torch.stack([first & 15, second & 15, first >> 4, second >> 4], dim=1)
        numbers = torch.tensor(qtype.values, dtype=torch.float32, device="cpu").bfloat16()[codes]
        return numbers.contiguous().view(torch.int64).view(-1).to(device)


@_kept
def _table(qtype: QType, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(qtype.values, dtype=torch.float32, device=device).to(dtype)


@_kept
def _numbers(qtype: QType) -> torch.Tensor:
    """The numbers of all codes, float32 on the CPU."""
    with torch.inference_mode(False):
        if qtype.kind == "table":
            return torch.tensor(qtype.values, dtype=torch.float32, device="cpu")
        assert qtype.float_dtype is not None
        return (
            torch.arange(1 << qtype.bits, dtype=torch.int64, device="cpu")
            .to(torch.uint8)
            .view(qtype.float_dtype)
            .float()
        )
