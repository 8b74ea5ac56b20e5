"""Row-major packed codes (docs/format.md) beside tiles of 16 rows, in one run: why the format is as it is.

    python benchmarks/layout/compare.py [--rounds 60]

Needs the native kernels of quanto_hf, a C++ compiler, and AVX-512 BF16 and VBMI. Each side is first compared with the
product in float64. Weights are rotated over more memory than any cache and all sides take turns. Prints the median and
the quartiles, and the time of tiles over that of row-major codes.
"""

import argparse
import ctypes
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from quanto_hf.ops import GroupedWeight, groups, pack
from quanto_hf.ops.cpu import _native

N = K = 4096
THREADS, ROTATED_BYTES, ROWS = 2, 600_000_000, 32
FLAGS = "-O3 -w -fopenmp -shared -fPIC -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mavx512bf16"
TYPES = {"int4 g64 asym": ("int4", 64, 4, 3, 1), "int8": ("int8", -1, 8, 0, 0)}  # ..., bits, and two numbers of _native


def tiles_of(codes: torch.Tensor, bits: int) -> torch.Tensor:
    per = 32 // bits
    words = codes.view(N // 16, 16, K // per, per).permute(0, 2, 1, 3).contiguous()
    if bits == 8:
        return words
    even_odd = words[..., [0, 2, 4, 6, 1, 3, 5, 7]]
    return even_odd[..., ::2] | even_odd[..., 1::2] << 4


def by_tile(scale: torch.Tensor) -> torch.Tensor:
    return scale.view(N // 16, 16, -1).transpose(1, 2).contiguous()


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Weight:
    """One weight in both layouts, with copies of each."""

    def __init__(self, name: str, library: ctypes.CDLL) -> None:
        self.qtype, self.group, self.bits, self.kind, self.scale_kind = TYPES[name]
        draw = torch.Generator().manual_seed(0)
        low, high, storage = (0, 16, torch.uint8) if self.bits == 4 else (-127, 128, torch.int8)
        codes = torch.randint(low, high, (N, K), generator=draw).to(storage)
        shape, dtype = (N, groups(K, self.group)), torch.bfloat16 if self.bits == 4 else torch.float32
        scale = (torch.rand(shape, generator=draw) * 0.01 + 0.001).to(dtype)
        zero = (torch.rand(shape, generator=draw) * 16).to(dtype) if self.bits == 4 else None
        self.row = [(pack(codes, self.bits), scale, zero)]
        swizzled = (by_tile(scale), by_tile(zero)) if self.bits == 4 else (scale, None)
        self.tiled = [(tiles_of(codes, self.bits), *swizzled)]
        count = ROTATED_BYTES // (N * K * self.bits // 8) + 1
        for copies in (self.row, self.tiled):
            copies += [tuple(None if t is None else t.clone() for t in copies[0]) for _ in range(count - 1)]
        self.table, self.library = torch.arange(16).float(), library

    def exact(self) -> torch.Tensor:
        return GroupedWeight(*self.row[0], self.qtype, self.group, K).dense(torch.float32)

    def native(self, i: int) -> list[int]:
        tensors = [*self.row[i % len(self.row)], self.table]
        return [*map(address, tensors), N, K, self.group, self.kind, self.scale_kind]

    def pointers(self, copies: list, i: int) -> list[ctypes.c_void_p]:
        return [ctypes.c_void_p(address(t)) for t in copies[i % len(copies)]]

    def linears(self, x: torch.Tensor) -> dict:
        m = x.shape[0]
        row, tiled = torch.empty(m, N, dtype=torch.bfloat16), torch.empty(m, N)
        to = [ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(tiled.data_ptr()), ctypes.c_int64(m), THREADS]
        size, call = [ctypes.c_int64(N), ctypes.c_int64(K)], self.library.tiled_linear
        return {
            "row-major": (lambda i: _native.linear(*self.native(i), address(x), 0, address(row), m, 1, THREADS), row),
            "tiles": (lambda i: call(self.bits, *self.pointers(self.tiled, i), *size, *to), tiled),
        }

    def dequantizes(self, index: torch.Tensor | None) -> dict:
        count = N if index is None else len(index)
        row, tiled = (torch.empty(count, K, dtype=torch.bfloat16) for _ in range(2))
        to = ctypes.c_void_p(tiled.data_ptr())
        if index is None:
            call, more = self.library.tiled_dequantize, [ctypes.c_int64(N), ctypes.c_int64(K), to, THREADS]
        else:
            which = [ctypes.c_void_p(index.data_ptr()), ctypes.c_int64(count)]
            call, more = self.library.tiled_rows, [ctypes.c_int64(K), *which, to, THREADS]
        return {
            "row-major": (
                lambda i: _native.dequantize(*self.native(i), address(index), count, address(row), 1, THREADS),
                row,
            ),
            "tiles": (lambda i: call(*self.pointers(self.tiled, i), *more), tiled),
        }


def measure(title: str, sides: dict, exact: torch.Tensor, rounds: int) -> None:
    for name, (call, out) in sides.items():
        out = call(0) if out is None else (call(0), out)[1]
        error = float((out.double() - exact).norm() / exact.norm())
        assert error < 0.004, f"{title}, {name}: {error}"
    times = {name: [] for name in sides}
    for i in range(rounds):
        for name, (call, _) in sides.items():
            start = time.perf_counter()
            call(i)
            times[name].append((time.perf_counter() - start) * 1e3)
    found = {name: statistics.quantiles(t[4:], n=4) for name, t in times.items()}
    line = "   ".join(f"{name} {b:.3f} ({a:.3f} to {c:.3f})" for name, (a, b, c) in found.items())
    print(f"{title:29} {line}   tiles / row-major {found['tiles'][1] / found['row-major'][1]:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(__file__).with_name("tiles.cpp"), f"{folder}/tiles.so"
        subprocess.run(["g++", *FLAGS.split(), "-o", binary, str(source)], check=True)
        library = ctypes.CDLL(binary)
    floats = [torch.randn(N, K).bfloat16() for _ in range(ROTATED_BYTES // (2 * N * K) + 1)]
    print(f"{N} x {K}, {THREADS} threads, level {_native.level()}, milliseconds: median (quartiles)")
    print("padding to 16 rows:", ", ".join(f"{n} rows {-n % 16 / n:+.2%}" for n in (2, 10, 100, 1000, 50257)))
    for name in TYPES:
        weight = Weight(name, library)
        exact = weight.exact().double()
        for m in (1, 8):
            x = torch.randn(m, K).bfloat16()
            product = x.double() @ exact.T
            weights = [weight.exact().bfloat16(), *floats[1:]]
            bf16 = {"torch bf16": (lambda i, x=x, w=weights: F.linear(x, w[i % len(w)]), None)}
            measure(f"{name}, M = {m}", {**bf16, **weight.linears(x)}, product, rounds)
        if weight.bits == 4:
            measure(f"{name}, dequantize", weight.dequantizes(None), exact, rounds)
            index = torch.randint(0, N, (ROWS,))
            measure(f"{name}, {ROWS} single rows", weight.dequantizes(index), exact[index], rounds * 4)


if __name__ == "__main__":
    main()
