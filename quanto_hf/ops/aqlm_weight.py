"""A weight of additive codes: its stored tensors, and what they stand for.

A weight of O rows and I columns is cut into blocks of ``out_group`` x ``in_group`` values. Each block is the sum of one
entry of each codebook, times the scale of its rows:

    W[o, i] = scales[o // out_group] * sum over k of codebooks[k, codes[o // out_group, i // in_group, k]]

Codes are signed integers that are read modulo the size of the codebook, so that any bits are codes. The method is that
of Egiazarian et al., "Extreme Compression of Large Language Models via Additive Quantization", 2024,
https://arxiv.org/abs/2401.06118.
"""

from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from quanto_hf.ops.grouped_weight import FLOATS, block_rows, check_devices
from quanto_hf.ops.scratch import scratch
from quanto_hf.ops.watched import sizes
from quanto_hf.qtypes import QType

# More entries than the largest published codebooks have, and few enough that all numbers of entries fit in 32 bits.
MAX_BITS = 24
# One codebook, two, and more are decoded differently; more bits than 16 are read by the same code.
KNOWN_COUNTS, KNOWN_BITS = 3, 17


def code_dtype(nbits: int) -> torch.dtype:
    """The smallest signed integer type that holds codes of so many bits."""
    return torch.int8 if nbits <= 8 else torch.int16 if nbits <= 16 else torch.int32


class AqlmWeight(NamedTuple):
    """A weight of additive codes: sums in float32, in the order of the codebooks, then times the scale.

    Args:
        codes: signed integers, shape (O // out_group, I // in_group, K); int8 for up to 8 bits, then int16, then int32.
        codebooks: float32, bfloat16 or float16, shape (K, 2**nbits, out_group, in_group).
        scales: the same dtypes, shape (O // out_group, 1, 1, 1).

    Example:
        >>> books = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
        >>> codes, scales = torch.tensor([[[0], [-1]]], dtype=torch.int8), torch.full((1, 1, 1, 1), 2.0)
        >>> AqlmWeight(codes, books, scales).dense(torch.float32)
        tensor([[2., 4., 6., 8.]])
    """

    codes: torch.Tensor
    codebooks: torch.Tensor
    scales: torch.Tensor

    @property
    def what(self) -> str:
        """How errors name such weights."""
        return "AQLM"

    @property
    def has_native_code(self) -> bool:
        """Whether kernels may know its codes: all kinds of codes are read alike."""
        return True

    @property
    def stored(self) -> tuple[torch.Tensor | None, ...]:
        """The stored tensors; they are the first fields."""
        return (self.codes, self.codebooks, self.scales)

    @property
    def shape(self) -> tuple[int, ...]:
        """(O, I)"""
        return (self.codes.shape[0] * self.codebooks.shape[2], self.codes.shape[1] * self.codebooks.shape[3])

    @property
    def device(self) -> torch.device:
        """Of the codes."""
        return self.codes.device

    def check(self, lead: tuple[str, ...] = ("rows",)) -> None:
        """Raise ValueError unless the tensors are those of such a weight; the text names the one that is wrong."""
        codes, codebooks, scales = self
        if codebooks.dim() != 4 or not codebooks.numel() or codebooks.dtype not in FLOATS:
            raise ValueError(
                "codebooks have shape (number of codebooks, 2**nbits, out_group, in_group), none of them 0, and a "
                f"float dtype, but these have shape {tuple(codebooks.shape)} and dtype {codebooks.dtype}"
            )
        count, size = codebooks.shape[:2]
        nbits = int(size).bit_length() - 1
        if size != 1 << nbits or not 1 <= nbits <= MAX_BITS:
            raise ValueError(f"codebooks have 2 to 2**{MAX_BITS} entries, a power of 2, but these have {size}")
        wanted = code_dtype(nbits)
        if codes.dim() != 3 or codes.shape[2] != count or codes.dtype != wanted:
            raise ValueError(
                f"codes for {count} codebooks of {nbits} bits have shape (row groups, column groups, {count}) and "
                f"dtype {wanted}, but these have shape {tuple(codes.shape)} and dtype {codes.dtype}"
            )
        if tuple(scales.shape) != (codes.shape[0], 1, 1, 1) or scales.dtype not in FLOATS:
            raise ValueError(
                f"scales of {codes.shape[0]} row groups have shape ({codes.shape[0]}, 1, 1, 1) and a float dtype, but "
                f"these have shape {tuple(scales.shape)} and dtype {scales.dtype}"
            )
        check_devices(codes.device, "codes are", {"codebooks are": codebooks, "scales are": scales})

    # ------------------------------------------------------------------------------------------- what it stands for

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The definition: the float weight, computed in float32, in operators that a trace can record."""
        return self._lines(self.codes, self.scales).flatten(0, 1).to(dtype)

    def _lines(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Rows of the weight as float32, shape (..., out_group, I), of codes of shape (..., I // in_group, K) and
        scales of shape (..., 1, 1, 1)."""
        count, size, *_ = sizes(self.codebooks)
        index = codes.long() & (size - 1)
        blocks = self.codebooks[0].float()[index.select(-1, 0)]
        for k in range(1, count):
            blocks = blocks + self.codebooks[k].float()[index.select(-1, k)]
        return (blocks * scales.float()).transpose(-3, -2).flatten(-2)

    def blocks(
        self, dtype: torch.dtype, out: torch.Tensor | None = None, scaled: bool = True
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Blocks of rows, one after the other in the same buffer, or in ``out``."""
        codes, codebooks, scales = self
        count, size, out_group, in_group = codebooks.shape
        entries = codebooks.float().view(count * size, out_group * in_group)
        first = torch.arange(0, count * size, size, device=codes.device, dtype=torch.int64)
        columns = codes.shape[1] * in_group
        step = max(1, block_rows(columns, torch.float32) // out_group)
        for start in range(0, codes.shape[0], step):
            some = codes[start : start + step]
            index = (some.long() & (size - 1)) + first
            blocks = entries[index[..., 0]]
            for k in range(1, count):
                blocks += entries[index[..., k]]
            blocks = blocks.view(*some.shape[:2], out_group, in_group).mul_(scales[start : start + step].float())
            cut = slice(start * out_group, (start + len(some)) * out_group)
            weight = (
                scratch("weight", (cut.stop - cut.start, columns), dtype, codes.device) if out is None else out[cut]
            )
            weight.view(len(some), out_group, some.shape[1], in_group).copy_(blocks.transpose(1, 2))
            yield cut, weight

    # ------------------------------------------------------------------------------------------------- parts of it

    def rows(self, which: Any) -> "AqlmWeight":
        """Some groups of ``out_group`` rows: a slice of them, or their numbers."""
        return self._replace(codes=self.codes[which], scales=self.scales[which])

    def recorded_rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows as float32, shape (*index.shape, I), for an index of any number of dimensions: what a trace can record.
        Not by indexing, which counts negative numbers from the end."""
        out_group, (_, *block) = sizes(self.codebooks)[2], sizes(self.codes)
        rows = index.to(torch.int64)
        lines = rows.div(out_group, rounding_mode="floor")
        found = F.embedding(lines, self.codes.flatten(1)).unflatten(-1, block)
        made = self._lines(found, F.embedding(lines, self.scales.flatten(1)).unflatten(-1, (1, 1, 1)))
        return made.take_along_dim((rows % out_group).unsqueeze(-1).unsqueeze(-1), -2).squeeze(-2)

    def map(self, change: Any) -> "AqlmWeight":
        """The same with other tensors: ``change(tensor)`` in place of each."""
        return AqlmWeight(*(change(tensor) for tensor in self))

    # ------------------------------------------------------------------------------------------------ the self-check

    @property
    def key(self) -> Hashable:
        """What decides which code of a kernel runs."""
        count, size, out_group, in_group = self.codebooks.shape
        # the tables of a check with more bits would be large
        nbits = min(size.bit_length() - 1, KNOWN_BITS)
        return (AqlmWeight, min(count, KNOWN_COUNTS), nbits, self.codebooks.dtype, out_group, in_group)

    @staticmethod
    def random(key: Any, rows: int = 37, columns: int = 0) -> "AqlmWeight":
        """A random weight of such a key, in which some codes have bits above those that count.

        Args:
            rows: groups of rows.
            columns: groups of columns; 0 for some that fill no vector.
        """
        _, count, nbits, dtype, out_group, in_group = key
        generator = torch.Generator().manual_seed(nbits)
        kind = code_dtype(nbits)
        low, high = torch.iinfo(kind).min, torch.iinfo(kind).max + 1
        shape = (rows, columns or 560 // in_group + 3, count)
        codes = torch.randint(low, high, shape, generator=generator, dtype=torch.int64).to(kind)
        # a table of 2**17 entries need not be normal to be wrong
        books = torch.rand((count, 1 << nbits, out_group, in_group), generator=generator, dtype=torch.float32) - 0.5
        scales = torch.rand((rows, 1, 1, 1), generator=generator, dtype=torch.float32) + 0.5
        return AqlmWeight(codes, books.to(dtype), scales.to(dtype))

    @staticmethod
    def title(key: Any) -> str:
        """The weights of a key, in words."""
        return f"AQLM weights of {key[2]} bits and {key[4]} x {key[5]} values"

    def activation_group(self, activations: QType) -> int:
        """Columns of x that share a scale where x is rounded to such numbers: all of a row."""
        return -1


# Row groups, column groups, codebooks, bits, out_group, in_group: the published layouts in small, and what hurts: one
# row, few bits, widths of no vector, several rows in a group.
SAMPLE_LAYOUTS = (
    (5, 12, 2, 8, 1, 8),
    (1, 9, 1, 8, 1, 8),
    (7, 3, 1, 16, 1, 16),
    (3, 70, 1, 16, 1, 8),
    (2, 5, 8, 8, 8, 8),
    (9, 4, 3, 5, 2, 3),
    (4, 2, 1, 12, 1, 40),
    (3, 2, 2, 17, 1, 4),
)


def sample_aqlm() -> list[AqlmWeight]:
    """Weights of all these layouts, for tests."""
    cases = []
    for i, (rows, columns, count, nbits, out_group, in_group) in enumerate(SAMPLE_LAYOUTS):
        key = (AqlmWeight, count, nbits, FLOATS[i % 3], out_group, in_group)
        cases.append(AqlmWeight.random(key, rows, columns))
    return cases
