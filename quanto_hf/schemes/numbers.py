"""The grouped schemes, one for each kind of number: integers, 8-bit floats and tables."""

from dataclasses import dataclass
from typing import ClassVar

from quanto_hf.schemes.base import register_scheme
from quanto_hf.schemes.grouped import PER_CHANNEL, Grouped


@register_scheme
@dataclass(frozen=True)
class Affine(Grouped):
    """Integers: w = code * scale, or (code - zero) * scale. int8 is symmetric only."""

    kind: ClassVar[str] = "affine"
    numbers: ClassVar[str] = "int"

    def _may_have_zero(self) -> bool:
        return self.type.is_packed


@register_scheme
@dataclass(frozen=True)
class Float8(Grouped):
    """8-bit floats times one scale per row: w = float(code) * scale."""

    kind: ClassVar[str] = "float8"
    numbers: ClassVar[str] = "float"

    def _group_sizes(self) -> tuple[int, ...]:
        return (PER_CHANNEL,)


@register_scheme
@dataclass(frozen=True)
class Lookup(Grouped):
    """A table of 16 values times a scale: w = table[code] * scale, for nf4 and fp4."""

    kind: ClassVar[str] = "lookup"
    numbers: ClassVar[str] = "table"
