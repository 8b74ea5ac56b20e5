"""A GPU kernel reads the packed layout as it is: a small Triton kernel, run by Triton's interpreter on the CPU.

The kernel is the proof, not a fast one. A part of the weight is one rectangle of bytes: each plane of it is an AND and
a shift, and meets a run of neighbouring columns of x. Tiles of 16 rows could be unpacked with as few lines, but a plane
of them meets columns 8 apart: x would have to be gathered or reordered, and the rows padded.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from quanto_hf.ops import GroupedWeight, groups, linear_op, pack
from quanto_hf.ops.packing import BLOCK_BYTES
from quanto_hf.qtypes import QTYPES

# Triton reads this when it is imported, and torch may have imported it before: the kernel runs in a process of its own.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def make_weight(qtype: str, group_size: int, asymmetric: bool, n: int, k: int) -> GroupedWeight:
    kind = QTYPES[qtype]
    signed = kind.storage is torch.int8
    codes = torch.randint(-127 if signed else 0, 128 if signed else kind.levels, (n, k)).to(kind.storage)
    shape, dtype = (n, groups(k, group_size)), torch.float32 if group_size < 0 else torch.bfloat16
    scale = (torch.rand(shape) * 0.1 + 0.01).to(dtype)
    zero = (torch.rand(shape) * kind.levels).to(dtype) if asymmetric else None
    return GroupedWeight(pack(codes, kind.bits), scale, zero, qtype, group_size, k)


# Full blocks, a shorter last block of every remainder that matters, rows and columns that fill no tile.
SHAPES = {"M16-N32-K256": (16, 32, 256), "M3-N19-K301": (3, 19, 301), "M17-N5-K77": (17, 5, 77), "M1-N1-K1": (1, 1, 1)}


if INTERPRETED and importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl

    @triton.jit
    def linear_kernel(
        x, packed, scale, zero, out, M, N, K, groups, offset, GROUP: tl.constexpr, BITS: tl.constexpr,
        HAS_ZERO: tl.constexpr, SIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
        BLOCK_BYTES: tl.constexpr,
    ):  # fmt: skip
        PER_BYTE: tl.constexpr = 8 // BITS
        BLOCK: tl.constexpr = BLOCK_BYTES * PER_BYTE
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        byte = tl.arange(0, BLOCK_BYTES)
        width = K // BLOCK * BLOCK_BYTES + (K % BLOCK + PER_BYTE - 1) // PER_BYTE
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for block in range(0, (K + BLOCK - 1) // BLOCK):
            codes_here = tl.minimum(K - block * BLOCK, BLOCK)
            bytes_here = (codes_here + PER_BYTE - 1) // PER_BYTE
            there = (n[:, None] < N) & (byte[None, :] < bytes_here)
            raw = tl.load(packed + n[:, None] * width + block * BLOCK_BYTES + byte[None, :], mask=there, other=0)
            for plane in tl.static_range(PER_BYTE):
                j = plane * bytes_here + byte
                column = block * BLOCK + j
                inside = (byte < bytes_here) & (j < codes_here)
                if SIGNED:
                    code = raw.to(tl.float32)
                else:
                    code = ((raw >> (plane * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
                at = n[:, None] * groups + column[None, :] // GROUP
                mask = (n[:, None] < N) & inside[None, :]
                if HAS_ZERO:
                    code -= tl.load(zero + at, mask=mask, other=0).to(tl.float32)
                else:
                    code -= offset
                weight = code * tl.load(scale + at, mask=mask, other=0).to(tl.float32)
                value = tl.load(x + m[:, None] * K + column[None, :], mask=(m[:, None] < M) & inside[None, :], other=0)
                total += tl.dot(value, tl.trans(weight), input_precision="ieee")
        tl.store(out + m[:, None] * N + n[None, :], total, mask=(m[:, None] < M) & (n[None, :] < N))

    def triton_linear(x: torch.Tensor, weight: GroupedWeight, block_m: int = 16, block_n: int = 16) -> torch.Tensor:
        packed, scale, zero, qtype, group_size, _ = weight
        kind = QTYPES[qtype]
        (m, k), n = x.shape, packed.shape[0]
        out = x.new_empty((m, n))
        signed = kind.storage is torch.int8
        linear_kernel[(triton.cdiv(m, block_m), triton.cdiv(n, block_n))](
            x, packed, scale, scale if zero is None else zero, out, m, n, k, scale.shape[1],
            0 if signed else -int(kind.qmin), group_size if group_size > 0 else k, kind.bits, zero is not None, signed,
            block_m, block_n, BLOCK_BYTES,
        )  # fmt: skip
        return out

    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    @pytest.mark.parametrize(
        ("qtype", "group_size", "asymmetric"),
        [("int8", -1, False), ("int4", 64, True), ("int4", 32, False), ("int2", 64, True), ("int2", -1, False)],
    )
    def test_a_triton_kernel_multiplies_by_the_stored_bytes(qtype, group_size, asymmetric, shape):
        m, n, k = shape
        weight, x = make_weight(qtype, group_size, asymmetric, n, k), torch.randn(m, k)
        wanted = linear_op.reference(x, weight, None)
        torch.testing.assert_close(triton_linear(x, weight), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts: the tests above")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_runs_in_tritons_interpreter():
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]
    assert "20 passed" in result.stdout
