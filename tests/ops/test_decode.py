"""Codes to numbers: every code of every type against its bit fields or table, exactly."""

import math

import pytest
import torch

from quanto_hf.ops import pack
from quanto_hf.ops.decode import decode, decode_reference
from quanto_hf.qtypes import QTYPES, QType, qtype

every_qtype = pytest.mark.parametrize("kind", QTYPES.values(), ids=str)
every_float = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)


def minifloat(code: int, mantissa_bits: int, bias: int) -> float:
    """The value of an 8-bit float, from sign, exponent and mantissa. NaN and infinity are not handled."""
    sign, exponent, mantissa = code >> 7, code >> mantissa_bits & (0x7F >> mantissa_bits), code % (1 << mantissa_bits)
    fraction = mantissa / (1 << mantissa_bits)
    size = math.ldexp(1 + fraction, exponent - bias) if exponent else math.ldexp(fraction, 1 - bias)
    return -size if sign else size


def number(code: int, kind: QType) -> float:
    """What a stored byte, or a packed code, stands for."""
    if kind.kind == "table":
        return kind.values[code]
    if kind.name == "float8_e4m3fn":
        return minifloat(code, 3, 7)
    if kind.name == "float8_e5m2":
        return minifloat(code, 2, 15)
    return float(code - 256 if kind.name == "int8" and code > 127 else code)


def stored_codes(kind: QType) -> list[int]:
    """Every code that a quantizer writes: all but NaN and infinity, which are the largest exponents of a float8."""
    if kind.kind == "float":
        last = {"float8_e4m3fn": 0x7E, "float8_e5m2": 0x7B}[kind.name]
        return [code for code in range(256) if code & 0x7F <= last]
    return list(range(kind.levels))


def packed_codes(kind: QType) -> tuple[torch.Tensor, int]:
    codes = torch.tensor(stored_codes(kind) * 3, dtype=torch.uint8)[None]
    return pack(codes, kind.bits).view(kind.storage), codes.shape[1]


@every_qtype
def test_every_code_stands_for_the_number_of_its_type(kind: QType):
    packed, n = packed_codes(kind)
    numbers = decode_reference(packed, kind, n)
    assert numbers.dtype == torch.float32
    # a table is stored in float32; everything else is exact in it
    expected = torch.tensor([number(code, kind) for code in stored_codes(kind) * 3], dtype=torch.float64).float()
    assert torch.equal(numbers[0], expected)


@every_qtype
@every_float
def test_the_fast_way_writes_the_rounded_numbers_of_the_reference_bit_by_bit(kind: QType, dtype: torch.dtype):
    packed, n = packed_codes(kind)
    packed = packed.expand(5, -1).contiguous()
    out = torch.full((5, n), math.nan, dtype=dtype)
    assert decode(packed, kind, out) is out
    expected = decode_reference(packed, kind, n).to(dtype)
    # bits, so that -0.0 and NaN count
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("kind", [t for t in QTYPES.values() if t.name != "nf4"], ids=str)
@every_float
def test_every_number_but_those_of_nf4_is_exact_in_every_float_dtype(kind: QType, dtype: torch.dtype):
    packed, n = packed_codes(kind)
    numbers = decode_reference(packed, kind, n)
    assert torch.equal(decode(packed, kind, torch.empty(1, n, dtype=dtype)).float(), numbers)


@pytest.mark.parametrize("name", ["int4", "int8", "float8_e4m3fn", "nf4"])
def test_the_numbers_of_one_call_survive_the_next_call(name: str):
    kind = qtype(name)
    packed, n = packed_codes(kind)
    first = decode(packed, kind, torch.empty(1, n))
    kept = first.clone()
    decode(packed.flip(1), kind, torch.empty(1, n))
    assert torch.equal(first, kept)


def test_numbers_decoded_in_inference_mode_leave_buffers_that_serve_outside_of_it():
    kind = qtype("nf4")
    packed, n = packed_codes(kind)
    with torch.inference_mode():
        inside = decode(packed, kind, torch.empty(1, n))
    assert torch.equal(decode(packed, kind, torch.empty(1, n)), inside)
