"""Weights, exact products and bounds for the tests of the native kernels."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from quanto_hf.ops import GroupedWeight, groups, linear_op, pack
from quanto_hf.ops.cpu.library import NATIVE
from quanto_hf.qtypes import QTYPES

needs_native = pytest.mark.skipif(NATIVE is None, reason="no native kernels here")
LEVELS: list[str] = NATIVE.levels() if NATIVE is not None else []

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
every_float = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)


def each_level() -> Iterator[str]:
    """Each level of instructions that this processor offers, in use during the body of a loop, for tests whose exact
    product serves all levels. A failed test shows the last one that is printed here."""
    assert NATIVE is not None
    before = NATIVE.level()
    try:
        for level in LEVELS:
            NATIVE.use_level(level)
            print("level", level)
            yield level
    finally:
        NATIVE.use_level(before)


@dataclass(frozen=True)
class Kind:
    """A way to store a weight."""

    qtype: str
    group_size: int
    asymmetric: bool = False

    def __str__(self) -> str:
        group = "rows" if self.group_size < 0 else f"g{self.group_size}"
        return f"{self.qtype}-{group}" + ("-asym" if self.asymmetric else "")


@dataclass
class Weight:
    """The stored tensors, and what the ops are told about them."""

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    kind: Kind
    columns: int

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[Any, ...]:
        """The arguments of the op ``linear``."""
        return (x, *self.rest(), bias)

    def rest(self) -> tuple[Any, ...]:
        """The weight as the ops take it, alone."""
        kind = self.kind
        return (GroupedWeight(self.packed, self.scale, self.zero, kind.qtype, kind.group_size, self.columns),)

    def dense(self) -> torch.Tensor:
        """The weight in float64."""
        return self.rest()[0].dense(torch.float32).double()

    def wide(self) -> torch.Tensor:
        """(|number| + |zero|) * |scale| in float64: a weight without the cancellation of number - zero."""
        ones = torch.ones_like(self.scale, dtype=torch.float32)
        plain = Weight(self.packed, ones, None if self.zero is None else ones * 0, self.kind, self.columns)
        number = plain.dense()
        size = self.kind.group_size if self.kind.group_size > 0 else self.columns
        spread = [t.double().abs().repeat_interleave(size, 1)[:, : self.columns] for t in (self.scale, self.offset())]
        return (number.abs() + spread[1]) * spread[0]

    def offset(self) -> torch.Tensor:
        """The zeros, or zeros."""
        return torch.zeros_like(self.scale) if self.zero is None else self.zero


def make_weight(
    kind: Kind,
    rows: int,
    columns: int,
    size: float = 0.02,
    scale_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Weight:
    """Random codes, all of which occur (but for NaN and infinity); scales of about ``size``; zeros that may lie outside
    of the codes."""
    generator = torch.Generator().manual_seed(seed * 7919 + rows * 104729 + columns)
    number = QTYPES[kind.qtype]
    if number.kind == "float":
        most = 0x7F if kind.qtype == "float8_e4m3fn" else 0x7C
        codes = torch.randint(0, most, (rows, columns), generator=generator)
        codes += 128 * torch.randint(0, 2, (rows, columns), generator=generator)
    else:
        low = -128 if number.storage is torch.int8 else 0
        codes = torch.randint(low, low + number.levels, (rows, columns), generator=generator)
    shape = (rows, groups(columns, kind.group_size))
    dtype = scale_dtype or (torch.float32 if kind.group_size < 0 else torch.bfloat16)
    scale = ((torch.rand(shape, generator=generator) + 0.1) * size).to(dtype)
    zero = None
    if kind.asymmetric:
        zero = ((torch.rand(shape, generator=generator) * 1.5 - 0.25) * number.levels + min(number.qmin, 0)).to(dtype)
    return Weight(pack(codes.to(number.storage), number.bits), scale, zero, kind, columns)


def native(op: Any = linear_op) -> Callable[..., torch.Tensor]:
    """The native kernel of an op; it must take what it is called with."""
    kernel = op.kernels[0]
    assert kernel.name.startswith("native")

    def run(*args: Any) -> torch.Tensor:
        assert kernel.refuses(*args) is None
        return kernel.run(*args)

    return run


# Roundings of half a unit in the last place that a product may have beyond its sum in float32: bfloat16 rounds the
# weight and the result, float16 the result.
ROUNDINGS = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 1}


@dataclass
class Exact:
    """``x @ weight.T + bias`` in float64, and how far a kernel may be from it."""

    value: torch.Tensor
    bound: torch.Tensor

    @staticmethod
    def of(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, tiny: float = 0.0) -> "Exact":
        """Let u be the unit roundoff of the dtype of x, and T = |x| @ |weight|.T + |bias| the size of the terms.

        - Each rounding to that dtype (of a weight, of the result) is at most u of its number: ``ROUNDINGS`` * u * T.
        - A sum of K numbers in float32 makes K roundings of at most 2^-24 T, which are as good as independent: they
          come to sqrt(K) of them, not K. Four more are those of the weight (number - zero, times scale), the product
          with a scale, and the bias.
        - With zeros, a kernel may sum number * x and zero * x on their own. Their size is that of
          (|number| + |zero|) * scale, not of the difference: W in place of T.
        - float16: a result below 2^-14 is a multiple of 2^-24.
        - ``tiny``: a factor, product or sum below it counts as zero, where a test says so.
        """
        a = x.double().reshape(-1, x.shape[-1])
        b = weight.dense()
        value = a @ b.T
        terms, wide = a.abs() @ b.abs().T, a.abs() @ weight.wide().T
        if bias is not None:
            value, terms, wide = value + bias.double(), terms + bias.double().abs(), wide + bias.double().abs()
        bound = ROUNDINGS[x.dtype] * torch.finfo(x.dtype).eps / 2 * terms + (4 + x.shape[-1] ** 0.5) * 2**-24 * wide
        if x.dtype is torch.float16:
            bound = bound + 2**-25
        if tiny:
            bound = bound + tiny * (a.abs().sum(1, keepdim=True) + b.abs().sum(1) + 2 * x.shape[-1])
        return Exact(value, bound)

    def check(self, made: torch.Tensor, rows: int | None = None) -> None:
        """``made`` holds the first ``rows`` rows of the product."""
        value, bound = self.value[:rows], self.bound[:rows]
        assert made.is_contiguous()
        error = (made.double().reshape(value.shape) - value).abs()
        assert (error <= bound).all(), f"error {error.max():.3g}, {(error / bound).nan_to_num().max():.3g} of the bound"


def classes(values: torch.Tensor) -> torch.Tensor:
    """0 for finite numbers, 1 and -1 for the infinities, 2 for NaN."""
    return torch.isposinf(values).int() - torch.isneginf(values).int() + 2 * torch.isnan(values).int()
