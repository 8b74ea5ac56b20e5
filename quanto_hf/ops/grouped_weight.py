"""A weight in which neighbouring columns of a row share a scale: its stored tensors, and what they stand for."""

from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from quanto_hf.ops.activation import activation_group
from quanto_hf.ops.decode import decode, decode_reference
from quanto_hf.ops.packing import pack, packed_width
from quanto_hf.ops.scratch import scratch
from quanto_hf.qtypes import QTYPES, QType

# Bytes of float weight that exist at a time. Blocks of 1 to 8 MB are equally fast; the limit is for the memory.
BLOCK_WEIGHT_BYTES = 4 << 20

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_devices(device: torch.device, owner: str, tensors: dict[str, torch.Tensor | None]) -> None:
    """Raise ValueError unless all tensors are on one device.

    Args:
        device: the device of ``owner``.
        owner: how errors name what the others must be beside, with its verb: "weight is".
        tensors: the others, by what errors call them: "input is", "row numbers are".
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"the {name} on {tensor.device}, but the {owner} on {device}; move one")


def groups(in_features: int, group_size: int) -> int:
    """Groups per row; ``group_size`` -1 means one group for the whole row (per channel)."""
    return -(-in_features // group_size) if group_size > 0 else 1


def cuts(columns: int, group_size: int) -> list[tuple[slice, slice]]:
    """The columns, and the groups, of the full groups of a row and of the shorter last one."""
    size = group_size if group_size > 0 else max(columns, 1)
    full = columns // size
    found = [(slice(0, full * size), slice(0, full))] if full else []
    if columns % size:
        found.append((slice(full * size, columns), slice(full, full + 1)))
    return found


def block_rows(columns: int, dtype: torch.dtype) -> int:
    """Rows of a block of ``BLOCK_WEIGHT_BYTES``, at least 1."""
    return max(1, BLOCK_WEIGHT_BYTES // (max(1, columns) * dtype.itemsize))


def symmetric_offset(qtype: QType) -> float:
    """The code that stands for 0 in a symmetric grid: 8 for int4, whose codes are stored unsigned; 0 for int8."""
    return float(-qtype.qmin) if qtype.kind == "int" and qtype.is_packed else 0.0


class GroupedWeight(NamedTuple):
    """A weight with one scale, and perhaps one zero, for each group of columns of each row: (code - zero) * scale.

    Args:
        packed: codes of ``qtype``, shape (..., out_features, ``packed_width(in_features, bits)``). The dimensions in
            front are those of experts.
        scale: float32, bfloat16 or float16, shape (..., out_features, groups).
        zero: None, or the shape and dtype of ``scale``, in units of codes.
        qtype: the name of a number type.
        group_size: columns that share a scale; -1 for all columns. The last group may be shorter.
        in_features: columns.

    Example:
        >>> codes, scale = torch.tensor([[2, -1]], dtype=torch.int8), torch.tensor([[0.5]])
        >>> GroupedWeight(codes, scale, None, "int8", -1, 2).dense(torch.float32)
        tensor([[ 1.0000, -0.5000]])
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    qtype: str
    group_size: int
    in_features: int

    @property
    def what(self) -> str:
        """How errors name such weights."""
        return self.qtype

    @property
    def has_native_code(self) -> bool:
        """Whether kernels may know its codes."""
        return self.type.native is not None

    @property
    def stored(self) -> tuple[torch.Tensor | None, ...]:
        """The stored tensors; they are the first fields."""
        return (self.packed, self.scale, self.zero)

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., out_features, in_features)"""
        return (*self.packed.shape[:-1], self.in_features)

    @property
    def device(self) -> torch.device:
        """Of the codes."""
        return self.packed.device

    @property
    def type(self) -> QType:
        """The number type."""
        return QTYPES[self.qtype]

    def check(self, lead: tuple[str, ...] = ("rows",)) -> None:
        """Raise ValueError unless the tensors are those of such a weight; the text names the one that is wrong.

        Args:
            lead: names of the dimensions before the columns: ("experts", "rows") for the weights of experts.
        """
        packed, scale, zero, qtype, group_size, in_features = self
        kind = QTYPES.get(qtype)
        if kind is None:
            raise ValueError(f"{qtype!r} is not a number type; choose one of {', '.join(sorted(QTYPES))}")
        width = packed_width(in_features, kind.bits)
        if packed.dim() != len(lead) + 1 or packed.shape[-1] != width or packed.dtype != kind.storage:
            raise ValueError(
                f"{qtype} codes of {in_features} columns have shape ({', '.join(lead)}, {width}) and dtype "
                f"{kind.storage}, but these have shape {tuple(packed.shape)} and dtype {packed.dtype}"
            )
        wanted = (*packed.shape[:-1], groups(in_features, group_size))
        for name, tensor in (("scale", scale), ("zero", zero)):
            if tensor is not None and (tuple(tensor.shape) != wanted or tensor.dtype not in FLOATS):
                raise ValueError(
                    f"the {name} of a {qtype} weight with group_size {group_size} has shape {wanted} and a float "
                    f"dtype, but this one has shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
                )
        check_devices(packed.device, "codes are", {"scale is": scale, "zero is": zero})
        if zero is not None and zero.dtype != scale.dtype:
            raise ValueError(f"scale and zero have the same dtype, but these have {scale.dtype} and {zero.dtype}")

    # ------------------------------------------------------------------------------------------- what it stands for

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The definition: the float weight, computed in float32, in operators that a trace can record."""
        kind = self.type
        weight = decode_reference(self.packed, kind, self.in_features)
        zero = None if self.zero is None else self.zero.float()
        columns, scale, offset = self.in_features, self.scale.float(), symmetric_offset(kind)
        parts = []
        for cut, which in cuts(columns, self.group_size):
            width, count = cut.stop - cut.start, which.stop - which.start
            part = weight.narrow(-1, cut.start, width).unflatten(-1, (count, width // count))
            steps, *lows = (t.narrow(-1, which.start, count).unsqueeze(-1) for t in (scale, zero) if t is not None)
            parts.append(((part - (lows[0] if lows else offset)) * steps).flatten(-2))
        return (weight if not parts else parts[0] if len(parts) == 1 else torch.cat(parts, -1)).to(dtype)

    def into(self, out: torch.Tensor) -> torch.Tensor:
        """Dequantize into ``out``, a contiguous float tensor of shape (rows, columns).

        bfloat16 with a bfloat16 scale is computed in bfloat16 (at most 1.5 units in the last place from the definition,
        1.8 times faster); everything else in float32, since a scale can be too small for float16.
        """
        exact = out.dtype is torch.float32 or (out.dtype is torch.bfloat16 and self.scale.dtype is torch.bfloat16)
        work = out if exact else scratch("float32", tuple(out.shape), torch.float32, out.device)
        decode(self.packed, self.type, work)
        offset = symmetric_offset(self.type)
        scale = self.scale.to(work.dtype)
        zero = None if self.zero is None else self.zero.to(work.dtype)
        for cut, which in cuts(work.shape[1], self.group_size):
            part = work[:, cut].unflatten(1, (which.stop - which.start, -1))
            if zero is not None:
                part.sub_(zero[:, which, None])
            elif offset:
                part.sub_(offset)
            part.mul_(scale[:, which, None])
        return out if work is out else out.copy_(work)

    def blocks(
        self, dtype: torch.dtype, out: torch.Tensor | None = None, scaled: bool = True
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Blocks of rows of a weight of 2 dimensions, one after the other in the same buffer, or in ``out``.

        Args:
            scaled: False leaves out the scales, of a weight without zeros.
        """
        rows, columns = self.shape
        step = block_rows(columns, dtype)
        for start in range(0, rows, step):
            cut = slice(start, min(start + step, rows))
            target = scratch("weight", (cut.stop - start, columns), dtype, self.device) if out is None else out[cut]
            part = self.rows(cut)
            yield cut, part.into(target) if scaled else decode(part.packed, self.type, target)

    # ------------------------------------------------------------------------------------------------- parts of it

    def rows(self, which: Any) -> "GroupedWeight":
        """Some rows: a slice, numbers, or one expert of a stack."""
        zero = None if self.zero is None else self.zero[which]
        return self._replace(packed=self.packed[which], scale=self.scale[which], zero=zero)

    def recorded_rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows as float32, shape (*index.shape, in_features), for an index of any number of dimensions: what a trace
        can record. Not by indexing, which counts negative numbers from the end."""
        rows = index.to(torch.int64)
        packed, scale, zero = (None if tensor is None else F.embedding(rows, tensor) for tensor in self.stored)
        assert packed is not None and scale is not None
        return self._replace(packed=packed, scale=scale, zero=zero).dense(torch.float32)

    def map(self, change: Any) -> "GroupedWeight":
        """The same with other tensors: ``change(tensor)`` in place of each."""
        zero = None if self.zero is None else change(self.zero)
        return self._replace(packed=change(self.packed), scale=change(self.scale), zero=zero)

    # ------------------------------------------------------------------------------------------------ the self-check

    @property
    def key(self) -> Hashable:
        """What decides which code of a kernel runs."""
        return (GroupedWeight, self.qtype, self.group_size, self.zero is not None, self.scale.dtype)

    @staticmethod
    def random(key: Any, rows: int = 37, columns: int = 0) -> "GroupedWeight":
        """A random weight of such a key, with every kind of code.

        Args:
            columns: 0 for blocks of 256 columns at most: two whole ones, and a short one, with a short group.
        """
        _, qtype, group_size, asymmetric, dtype = key
        kind = QTYPES[qtype]
        columns = columns or 600 + (2 * group_size if 0 < group_size <= 512 else 0)
        generator = torch.Generator().manual_seed(rows * columns)
        low = int(kind.qmin) if kind.storage is torch.int8 else 0
        high = low + kind.levels if kind.kind != "float" else 0x78
        codes = torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int64).to(kind.storage)
        if kind.kind == "float":  # the sign is the highest bit
            codes[:, ::2] |= 0x80
        shape = (rows, groups(columns, group_size))
        scale = (torch.rand(shape, generator=generator, dtype=torch.float32) + 0.5) / kind.qmax
        zero = torch.rand(shape, generator=generator, dtype=torch.float32) * kind.levels + min(kind.qmin, 0)
        given = zero.to(dtype) if asymmetric else None
        return GroupedWeight(pack(codes, kind.bits), scale.to(dtype), given, qtype, group_size, columns)

    @staticmethod
    def title(key: Any) -> str:
        """The weights of a key, in words."""
        return f"{key[1]} weights with group_size {key[2]}"

    def activation_group(self, activations: QType) -> int:
        """Columns of x that share a scale where x is rounded to such numbers; -1 for all of a row."""
        return activation_group(self.type, activations)


# Rows, columns, group size and whether integers have a zero: whole groups, a shorter last group, whole rows, and what
# torch's int8 product takes.
SAMPLE_WEIGHTS = ((5, 96, 32, True), (1, 200, 64, False), (17, 7, -1, True), (9, 144, -1, False))


def sample_weights() -> list[GroupedWeight]:
    """Weights of each number type, with random codes, for tests."""
    cases = []
    for name, kind in QTYPES.items():
        for rows, columns, group_size, asymmetric in SAMPLE_WEIGHTS:
            key = (GroupedWeight, name, group_size, kind.kind == "int" and asymmetric, torch.float32)
            cases.append(GroupedWeight.random(key, rows, columns))
    return cases
