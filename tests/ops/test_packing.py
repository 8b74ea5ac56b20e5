"""The packed layout: exact round trips, and every bit where the docstring of ops/packing.py says it is."""

import doctest
import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quanto_hf.ops import pack, packed_width, unpack

BLOCK = 64

leading = st.lists(st.integers(0, 3), max_size=3).map(tuple)
# 700 codes of 2 bits are 2 full blocks and a tail; of 4 bits, 5 and a tail
widths = st.integers(0, 700) | st.sampled_from([127, 128, 129, 255, 256, 257, 512])
packed_bits = st.sampled_from([2, 4])
seeds = st.integers(0, 2**31)


def random_codes(shape: tuple[int, ...], bits: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def naive_pack(codes: list[int], bits: int) -> list[int]:
    """The text of the docstring, word for word, in plain Python."""
    per_block = BLOCK * 8 // bits
    result = []
    for start in range(0, len(codes), per_block):
        block = codes[start : start + per_block]
        m = (len(block) * bits + 7) // 8
        taken = [0] * m
        for j, code in enumerate(block):
            taken[j % m] |= code << (j // m * bits)
        result += taken
    return result


@given(leading, widths, st.sampled_from([2, 4, 8]), seeds)
@settings(max_examples=150, deadline=None)
def test_unpack_gives_back_what_pack_took(lead: tuple[int, ...], n: int, bits: int, seed: int):
    codes = random_codes((*lead, n), bits, seed)
    packed = pack(codes, bits)
    assert packed.shape == (*lead, packed_width(n, bits))
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, n), codes)


@given(widths, packed_bits, seeds)
@settings(max_examples=100, deadline=None)
def test_every_code_sits_where_the_docstring_says(n: int, bits: int, seed: int):
    codes = random_codes((n,), bits, seed)
    assert pack(codes, bits).tolist() == naive_pack(codes.tolist(), bits)


@pytest.mark.parametrize(
    "bits, codes, expected",
    [
        # 2 bytes: codes 0, 2, 4 in the first, 1, 3 in the second
        (4, [1, 2, 3], [1 | 3 << 4, 2]),
        (4, [15], [15]),
        (2, [3, 0, 1], [3 | 0 << 2 | 1 << 4]),
        (2, [1, 2, 3, 0, 1], [1 | 3 << 2 | 1 << 4, 2 | 0 << 2]),
    ],
    ids=["int4-3-codes", "int4-1-code", "int2-3-codes", "int2-5-codes"],
)
def test_short_rows_pack_to_these_bytes(bits: int, codes: list[int], expected: list[int]):
    assert pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == expected


def test_a_full_int4_block_has_its_first_64_codes_in_the_low_and_its_last_64_in_the_high_nibbles():
    codes = random_codes((2 * 128,), 4)
    second = pack(codes, 4)[BLOCK:]
    assert torch.equal(second & 15, codes[128:192])
    assert torch.equal(second >> 4, codes[192:])


@given(widths, packed_bits)
@settings(max_examples=100, deadline=None)
def test_bits_that_belong_to_no_code_are_zero(n: int, bits: int):
    ones = torch.full((n,), 2**bits - 1, dtype=torch.uint8)
    assert sum(int(byte).bit_count() for byte in pack(ones, bits)) == n * bits


@given(widths, packed_bits)
@settings(max_examples=100, deadline=None)
def test_a_row_takes_its_bits_rounded_up_to_bytes(n: int, bits: int):
    assert packed_width(n, bits) == (n * bits + 7) // 8


def test_codes_of_8_bits_are_returned_as_they_are():
    codes = torch.arange(-5, 5, dtype=torch.int8)
    assert pack(codes, 8) is codes
    assert unpack(codes, 8, 10) is codes


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_unpack_writes_to_out_and_returns_it(bits: int):
    codes = random_codes((3, 131), bits)
    out = torch.full_like(codes, 77)
    assert unpack(pack(codes, bits), bits, 131, out) is out
    assert torch.equal(out, codes)


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_need_not_be_contiguous(bits: int):
    codes = random_codes((300, 7), bits)
    assert torch.equal(pack(codes.T, bits), pack(codes.T.contiguous(), bits))
    packed = pack(codes, bits)
    strided = packed.T.contiguous().T
    assert torch.equal(unpack(strided, bits, 7), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("off", [-1, 1], ids=["too-narrow", "too-wide"])
def test_a_packed_tensor_of_another_width_is_an_error_that_names_both(bits: int, off: int):
    width = packed_width(100, bits)
    with pytest.raises(ValueError, match=f"have {width + off} bytes, but 100 codes of {bits} bits take {width}"):
        unpack(torch.zeros(2, width + off, dtype=torch.uint8), bits, 100)


def test_the_examples_in_the_docstrings_are_true():
    result = doctest.testmod(importlib.import_module("quanto_hf.ops.packing"))
    assert result.attempted and not result.failed
