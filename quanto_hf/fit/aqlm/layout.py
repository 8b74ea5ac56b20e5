"""Additive codebooks: shapes and dtypes, and the way between a weight and its groups."""

from dataclasses import dataclass

import torch

from quanto_hf.ops import MAX_BITS, code_dtype

# What can be read: far more codebooks than anybody has, and few enough that sizes of tensors are numbers that torch
# takes. What can be made is less.
MAX_BOOKS = 1024
MADE_BITS, MADE_BOOKS = 16, 64


@dataclass(frozen=True)
class Layout:
    """How a weight is cut into groups that share one set of codes.

    Args:
        num_codebooks: vectors that are added up for each group.
        nbits: bits of a code; a codebook has ``2 ** nbits`` vectors.
        out_group: rows of a group, which share a scale.
        in_group: columns of a group.

    Raises:
        ValueError: a value is not a whole number, or out of range.

    Example:
        >>> Layout(2, 8).size, Layout(2, 8).width, Layout(1, 20).refuses()
        (256, 8, 'nbits=20 is out of range; choose 1 to 16')
    """

    num_codebooks: int
    nbits: int
    out_group: int = 1
    in_group: int = 8

    def __post_init__(self) -> None:
        for name, most in (("num_codebooks", MAX_BOOKS), ("nbits", MAX_BITS), ("out_group", None), ("in_group", None)):
            value = getattr(self, name)
            if type(value) is not int or value < 1 or (most is not None and value > most):
                there = f"from 1 to {most}" if most else "above 0"
                raise ValueError(f"{name}={value!r} does not work for AQLM weights; choose a whole number {there}")

    def refuses(self) -> str | None:
        """Why such weights cannot be made, in one sentence, or None. More can be read."""
        for name, most in (("num_codebooks", MADE_BOOKS), ("nbits", MADE_BITS)):
            if getattr(self, name) > most:
                return f"{name}={getattr(self, name)} is out of range; choose 1 to {most}"
        return None

    @property
    def size(self) -> int:
        """Vectors of a codebook."""
        return int(1 << self.nbits)

    @property
    def width(self) -> int:
        """Values of a group."""
        return self.out_group * self.in_group

    @property
    def code_dtype(self) -> torch.dtype:
        """The smallest signed integers that hold a code; codes above their range are stored as negative numbers."""
        return code_dtype(self.nbits)

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Groups along the rows and along the columns of a weight.

        Raises:
            ValueError: the weight has not two dimensions, or its features cannot be divided into groups.
        """
        if len(shape) != 2:
            raise ValueError(f"the weight has the shape {list(shape)}; it must be (out_features, in_features)")
        rows, columns = shape
        for name, features, group in (("out", rows, self.out_group), ("in", columns, self.in_group)):
            if features == 0 or features % group:
                raise ValueError(
                    f"{name}_features={features} is not a multiple of {name}_group={group} above 0; "
                    f"choose another {name}_group, or leave this layer out"
                )
        return rows // self.out_group, columns // self.in_group

    def to_groups(self, weight: torch.Tensor) -> torch.Tensor:
        """(out_features, in_features) to (row groups, column groups, values of a group), contiguous."""
        rows, columns = self.grid(tuple(weight.shape))
        cut = weight.reshape(rows, self.out_group, columns, self.in_group)
        return cut.transpose(1, 2).reshape(rows, columns, self.width).contiguous()

    def to_weight(self, groups: torch.Tensor) -> torch.Tensor:
        """The other way, contiguous."""
        rows, columns, _ = groups.shape
        cut = groups.view(rows, columns, self.out_group, self.in_group).transpose(1, 2)
        return cut.reshape(rows * self.out_group, columns * self.in_group).contiguous()


def decode(codes: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """The sum of the vectors that the codes name.

    Args:
        codes: integers from 0, shape (..., K).
        codebooks: shape (K, vectors, values).

    Returns:
        Shape (..., values).
    """
    flat = codes.reshape(-1, codes.shape[-1])
    total = codebooks[0].index_select(0, flat[:, 0])
    for k in range(1, codebooks.shape[0]):
        total += codebooks[k].index_select(0, flat[:, k])
    return total.view(*codes.shape[:-1], codebooks.shape[-1])


def stored_codes(codes: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Codes from 0 as the signed integers of the format."""
    return codes.to(layout.code_dtype)  # wraps around


def read_codes(codes: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Signed integers of the format as int32 codes from 0."""
    return codes.to(torch.int32).bitwise_and_(layout.size - 1)
