"""The op ``dequantize``: packed codes, scale and zero to a float weight."""

from typing import Any

import torch

from quanto_hf.ops.decode import decode, decode_reference
from quanto_hf.ops.packing import pack, packed_width
from quanto_hf.ops.registry import Op
from quanto_hf.ops.scratch import scratch
from quanto_hf.qtypes import QTYPES, QType

# Bytes of float weight that exist at a time. Blocks of 1 to 8 MB are equally fast; the limit is for the memory.
BLOCK_WEIGHT_BYTES = 4 << 20

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def groups(in_features: int, group_size: int) -> int:
    """Groups per row; ``group_size`` -1 means one group for the whole row (per channel)."""
    return -(-in_features // group_size) if group_size > 0 else 1


def check_weight(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    qtype: str,
    group_size: int,
    in_features: int,
    lead: tuple[str, ...] = ("rows",),
) -> None:
    """Raise ValueError unless the tensors are those of a weight with ``in_features`` columns.

    Args:
        packed: codes of ``qtype``, shape (rows, ``packed_width(in_features, bits)``).
        scale: shape (rows, groups), float32, bfloat16 or float16.
        zero: None, or the shape and dtype of ``scale``, in units of codes.
        qtype: the name of a number type.
        group_size: columns that share a scale; -1 for all columns. The last group may be shorter.
        in_features: columns.
        lead: names of the dimensions before the columns: ("experts", "rows") for the weights of experts.
    """
    kind = QTYPES.get(qtype)
    if kind is None:
        raise ValueError(f"{qtype!r} is not a number type; choose one of {', '.join(sorted(QTYPES))}")
    width = packed_width(in_features, kind.bits)
    if packed.dim() != len(lead) + 1 or packed.shape[-1] != width or packed.dtype != kind.storage:
        raise ValueError(
            f"{qtype} codes of {in_features} columns have shape ({', '.join(lead)}, {width}) and dtype {kind.storage}, "
            f"but these have shape {tuple(packed.shape)} and dtype {packed.dtype}"
        )
    wanted = (*packed.shape[:-1], groups(in_features, group_size))
    for name, tensor in (("scale", scale), ("zero", zero)):
        if tensor is not None and (tuple(tensor.shape) != wanted or tensor.dtype not in FLOATS):
            raise ValueError(
                f"the {name} of a {qtype} weight with group_size {group_size} has shape {wanted} and a float dtype, "
                f"but this one has shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
            )
        if tensor is not None and tensor.device != packed.device:
            raise ValueError(f"the {name} is on {tensor.device}, but the codes are on {packed.device}; move one")
    if zero is not None and zero.dtype != scale.dtype:
        raise ValueError(f"scale and zero have the same dtype, but these have {scale.dtype} and {zero.dtype}")


def _check(packed: Any, scale: Any, zero: Any, qtype: str, group_size: int, in_features: int, dtype: Any) -> None:
    check_weight(packed, scale, zero, qtype, group_size, in_features)
    if dtype not in FLOATS:
        raise ValueError(f"cannot dequantize to {dtype}; choose one of {', '.join(map(str, FLOATS))}")


def scale_in_place(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, offset: float, group_size: int
) -> torch.Tensor:
    """``(weight - zero) * scale``, or ``(weight - offset) * scale`` without a zero, in the dtype of ``weight``.

    Args:
        weight: numbers of the codes, shape (rows, columns), contiguous; overwritten.
        scale: shape (rows, groups).
        zero: None or the shape of ``scale``.
        offset: the zero of a symmetric integer grid.
        group_size: columns that share a scale, -1 for all.
    """
    columns = weight.shape[1]
    size = group_size if group_size > 0 else max(columns, 1)
    scale = scale.to(weight.dtype)
    zero = None if zero is None else zero.to(weight.dtype)
    full = columns // size
    parts = [(slice(0, full * size), slice(0, full), size)] if full else []
    if columns % size:
        parts.append((slice(full * size, columns), slice(full, full + 1), columns - full * size))
    for cut, which, width in parts:
        part = weight[:, cut].unflatten(1, (-1, width))
        if zero is not None:
            part.sub_(zero[:, which, None])
        elif offset:
            part.sub_(offset)
        part.mul_(scale[:, which, None])
    return weight


def symmetric_offset(qtype: QType) -> float:
    """The code that stands for 0 in a symmetric grid: 8 for int4, whose codes are stored unsigned; 0 for int8."""
    return float(-qtype.qmin) if qtype.kind == "int" and qtype.is_packed else 0.0


def _reference(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    qtype: str,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    kind = QTYPES[qtype]
    weight = decode_reference(packed, kind, in_features)
    zero = None if zero is None else zero.float()
    return _scaled(weight, scale.float(), zero, symmetric_offset(kind), group_size, in_features).to(dtype)


def _scaled(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, offset: float, group_size: int, columns: int
) -> torch.Tensor:
    """:func:`scale_in_place` as a new tensor, with any dimensions before the columns: what a trace can record."""
    size = group_size if group_size > 0 else max(columns, 1)
    whole = columns // size * size
    parts = []
    for start, end, width in ((0, whole, size), (whole, columns, columns - whole)):
        if start < end:
            count = (end - start) // width
            part = weight.narrow(-1, start, end - start).unflatten(-1, (count, width))
            steps, *lows = (t.narrow(-1, start // size, count).unsqueeze(-1) for t in (scale, zero) if t is not None)
            parts.append(((part - (lows[0] if lows else offset)) * steps).flatten(-2))
    return weight if not parts else parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _fake(packed: Any, scale: Any, zero: Any, qtype: str, group_size: int, in_features: int, dtype: Any) -> Any:
    return scale.new_empty((packed.shape[0], in_features), dtype=dtype)


# Rows, columns, group size and whether integers have a zero: whole groups, a shorter last group, whole rows, and what
# torch's int8 product takes.
SAMPLE_WEIGHTS = ((5, 96, 32, True), (1, 200, 64, False), (17, 7, -1, True), (9, 144, -1, False))


def sample_weights(seed: int) -> list[tuple[Any, ...]]:
    """(packed, scale, zero, qtype, group_size, in_features) of each number type, with random codes, for tests."""
    generator = torch.Generator().manual_seed(seed)
    cases: list[tuple[Any, ...]] = []
    for name, kind in QTYPES.items():
        for rows, columns, group_size, asymmetric in SAMPLE_WEIGHTS:
            low = int(kind.qmin) if kind.storage is torch.int8 else 0
            high = low + kind.levels - 1 if kind.kind != "float" else 0x78
            codes = torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int64).to(kind.storage)
            shape = (rows, groups(columns, group_size))
            scale = torch.rand(shape, generator=generator, dtype=torch.float32) * 0.1 + 0.01
            zero = (
                torch.rand(shape, generator=generator, dtype=torch.float32) * kind.levels
                if kind.kind == "int" and asymmetric
                else None
            )
            cases.append((pack(codes, kind.bits), scale, zero, name, group_size, columns))
    return cases


def _samples(seed: int) -> list[tuple[Any, ...]]:
    return [(*weight, dtype) for weight in sample_weights(seed) for dtype in FLOATS]


dequantize = Op(
    name="dequantize",
    schema="(Tensor packed, Tensor scale, Tensor? zero, str qtype, int group_size, int in_features, "
    "ScalarType dtype) -> Tensor",
    check=_check,
    reference=_reference,
    fake=_fake,
    samples=_samples,
)


def dequantize_rows(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    qtype: str,
    group_size: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """Dequantize into ``out``, a contiguous float tensor of shape (rows, columns).

    bfloat16 with a bfloat16 scale is computed in bfloat16 (at most 1.5 units in the last place from the reference,
    1.8 times faster); everything else in float32, since a scale can be too small for float16.
    """
    kind = QTYPES[qtype]
    exact = out.dtype is torch.float32 or (out.dtype is torch.bfloat16 and scale.dtype is torch.bfloat16)
    work = out if exact else scratch("float32", tuple(out.shape), torch.float32, out.device)
    scale_in_place(decode(packed, kind, work), scale, zero, symmetric_offset(kind), group_size)
    return out if work is out else out.copy_(work)


def block_rows(columns: int, dtype: torch.dtype) -> int:
    """Rows of a block of ``BLOCK_WEIGHT_BYTES``, at least 1."""
    return max(1, BLOCK_WEIGHT_BYTES // (max(1, columns) * dtype.itemsize))
