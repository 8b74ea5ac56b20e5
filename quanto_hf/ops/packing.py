"""The portable packed layout (docs/format.md): these functions, and nothing else knows it.

A row of codes is cut into blocks of ``BLOCK_BYTES`` packed bytes; the last block may be shorter. A block of n codes
takes m = ceil(n * bits / 8) bytes and is *planar*: code j sits in byte j mod m, at bit (j div m) * bits. So the first
m codes are the lowest bits of the m bytes, the next m codes the bits above them: unpacking is an AND and a shift.

Codes of other widths than 1, 2, 4 and 8 bits are cut into parts of these, the widest part being the lowest bits: 3 is
2 and 1, 7 is 4, 2 and 1. A row is then the packed row of the lowest parts, and behind it those of the other ones.
"""

import torch

from quanto_hf.ops.watched import sizes

# One cache line, and one 512-bit register. Pure torch unpacks 64-byte planes 1.9x faster than 16-byte ones, and
# longer planes gain nothing more (1.7 ms for 4096 x 4096 int4 with 64 and with 128 bytes, 3.0 ms with 16).
BLOCK_BYTES = 64


def packed_width(n: int, bits: int) -> int:
    """Bytes that a row of ``n`` codes takes.

    Example:
        >>> packed_width(128, 4), packed_width(5, 2), packed_width(7, 8), packed_width(64, 3)
        (64, 2, 7, 24)
    """
    return sum(-(-n * part // 8) for part, _ in _parts(bits))


def row_lengths(width: int, bits: int) -> list[int]:
    """The numbers of codes, above 0, whose row takes ``width`` bytes, the largest first: the inverse of
    :func:`packed_width`.

    Example:
        >>> row_lengths(2, 4), row_lengths(4, 3)
        ([4, 3], [])
    """
    most = width * 8 // bits
    return [n for n in range(most, max(most - 16, 0), -1) if packed_width(n, bits) == width]


def _parts(bits: int) -> list[tuple[int, int]]:
    """Width, and lowest bit, of each part that a code is cut into."""
    parts, low = [], 0
    for part in (8, 4, 2, 1):
        while bits - low >= part:
            parts.append((part, low))
            low += part
    return parts


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes of 1 to 8 bits.

    Args:
        codes: uint8, shape (..., n), each below ``2 ** bits``. 8-bit codes of any dtype are returned as they are.
        bits: size of one code.

    Returns:
        uint8, shape (..., ``packed_width(n, bits)``). Unused bits of the last byte are 0.

    Example:
        >>> pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist()  # bytes: 1 | 3 << 4, 2
        [[49, 2]]
    """
    if bits == 8:
        return codes
    if len(parts := _parts(bits)) > 1:
        return torch.cat([pack((codes >> low) & ((1 << part) - 1), part) for part, low in parts], -1)
    n, per_byte = codes.shape[-1], 8 // bits
    packed = codes.new_zeros((*codes.shape[:-1], packed_width(n, bits)))
    for source, target, planes in _blocks(codes, packed, n, per_byte):
        for j in range(planes):
            width = min(target.shape[-1], source.shape[-1] - j * target.shape[-1])
            plane = source.narrow(-1, j * target.shape[-1], width)
            target.narrow(-1, 0, width).bitwise_or_(plane << (j * bits))
    return packed


def unpack(packed: torch.Tensor, bits: int, n: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """The codes of a packed tensor: the inverse of :func:`pack`.

    Args:
        packed: uint8, shape (..., ``packed_width(n, bits)``).
        bits: size of one code.
        n: codes per row.
        out: uint8, shape (..., n), contiguous: written and returned if given.

    Raises:
        ValueError: the width of ``packed`` is not that of ``n`` codes.
    """
    width = sizes(packed)[-1]
    if width != packed_width(n, bits):
        raise ValueError(f"packed rows have {width} bytes, but {n} codes of {bits} bits take {packed_width(n, bits)}")
    if bits == 8:
        return packed if out is None else out.copy_(packed)
    if len(parts := _parts(bits)) > 1:
        starts = [packed_width(n, low) for _, low in parts]
        cut = [
            unpack(packed.narrow(-1, start, packed_width(n, part)), part, n) << low
            for start, (part, low) in zip(starts, parts, strict=True)
        ]
        codes = cut[0]
        for plane in cut[1:]:
            codes = codes | plane
        return codes if out is None else out.copy_(codes)
    if out is None:
        return _unpack(packed, bits, n)
    codes, mask = out, (1 << bits) - 1
    for target, source, planes in _blocks(codes, packed, n, 8 // bits):
        for j in range(planes):
            width = min(source.shape[-1], target.shape[-1] - j * source.shape[-1])
            plane = target.narrow(-1, j * source.shape[-1], width)
            torch.bitwise_right_shift(source.narrow(-1, 0, width), j * bits, out=plane)
            # the topmost plane has no bits above it
            if (j + 1) * bits < 8:
                plane.bitwise_and_(mask)
    return codes


def _unpack(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """The same without writing into a tensor: what a trace can record. Not by an index with "...", in whose place a
    trace has the number of the dimension."""
    per_byte, mask = 8 // bits, (1 << bits) - 1
    full = n // (BLOCK_BYTES * per_byte)
    split = full * BLOCK_BYTES
    rest = n - split * per_byte
    parts = []
    if full:
        blocks = packed.narrow(-1, 0, split).unflatten(-1, (full, BLOCK_BYTES))
        parts.append(torch.stack([(blocks >> (j * bits)) & mask for j in range(per_byte)], -2).flatten(-3))
    if rest or not full:
        tail = packed.narrow(-1, split, packed_width(rest, bits))
        parts.append(torch.cat([(tail >> (j * bits)) & mask for j in range(per_byte)], -1).narrow(-1, 0, rest))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _blocks(
    codes: torch.Tensor, packed: torch.Tensor, n: int, per_byte: int
) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """Views of the codes and bytes of the full blocks, and of the shorter last block, with their number of planes."""
    full = n // (BLOCK_BYTES * per_byte)
    split = full * BLOCK_BYTES
    parts = []
    if full:
        whole = codes.narrow(-1, 0, split * per_byte).unflatten(-1, (full, BLOCK_BYTES * per_byte))
        parts.append((whole, packed.narrow(-1, 0, split).unflatten(-1, (full, BLOCK_BYTES)), per_byte))
    if rest := n - split * per_byte:
        tail = packed.narrow(-1, split, packed.shape[-1] - split)
        # a tail of 1 code in 2 bits has 1 plane, of 3 codes in 2 bytes has 2
        parts.append((codes.narrow(-1, split * per_byte, rest), tail, -(-rest // tail.shape[-1])))
    return parts
