"""Number types: what one stored number is. Imports torch only.

A :class:`QType` says how many bits a code has and what it stands for. It does not say how codes are grouped,
scaled or laid out in memory: that is the job of a scheme.
"""

from dataclasses import dataclass

import torch

# The 16 values of NormalFloat-4: quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.
# Source: Dettmers et al., "QLoRA", 2023, https://arxiv.org/abs/2305.14314, appendix E.
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# The 16 values of the 4-bit float e2m1: sign bit, then 2 bits of exponent and 1 of mantissa.
# Source: OCP Microscaling Formats (MX) Specification 1.0, section 5.3.3.
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class QType:
    """A number type.

    Args:
        name: the name that users write, for example ``"int4"``.
        bits: size of one code.
        kind: ``"int"`` (evenly spaced), ``"float"`` (one IEEE-like number of 8 bits) or ``"table"`` (a code is an
            index into ``values``).
        qmin: smallest value that a code stands for. For ``"int"`` the smallest code of the asymmetric grid is
            always 0; ``qmin`` and ``qmax`` are those of the symmetric grid.
        qmax: largest value that a code stands for.
        storage: dtype of the stored codes; always an integer type, since ``Module.to(dtype)`` would convert a
            parameter of a float8 dtype without a word.
        float_dtype: the torch dtype of the same bits, for ``"float"``.
        values: the table, for ``"table"``.
    """

    name: str
    bits: int
    kind: str
    qmin: float
    qmax: float
    storage: torch.dtype = torch.uint8
    float_dtype: torch.dtype | None = None
    values: tuple[float, ...] | None = None

    @property
    def levels(self) -> int:
        """Number of different codes, ``2 ** bits``."""
        return 1 << self.bits

    @property
    def is_packed(self) -> bool:
        """Whether several codes share a byte."""
        return self.bits < 8

    def __str__(self) -> str:
        return self.name


qint2 = QType("int2", 2, "int", -2, 1)
qint4 = QType("int4", 4, "int", -8, 7)
# int8 is symmetric without -128, so that a weight and its negative have mirrored codes
qint8 = QType("int8", 8, "int", -127, 127, storage=torch.int8)
qfloat8_e4m3fn = QType("float8_e4m3fn", 8, "float", -448.0, 448.0, float_dtype=torch.float8_e4m3fn)
qfloat8_e5m2 = QType("float8_e5m2", 8, "float", -57344.0, 57344.0, float_dtype=torch.float8_e5m2)
qfloat8 = qfloat8_e4m3fn
qnf4 = QType("nf4", 4, "table", -1.0, 1.0, values=NF4_VALUES)
qfp4 = QType("fp4", 4, "table", -6.0, 6.0, values=FP4_VALUES)

QTYPES: dict[str, QType] = {
    t.name: t for t in (qint2, qint4, qint8, qfloat8_e4m3fn, qfloat8_e5m2, qnf4, qfp4)
}  # fmt: skip

_ALIASES = {"float8": "float8_e4m3fn"}


def qtype(name: "str | QType") -> QType:
    """The number type of a name.

    Args:
        name: a name in ``QTYPES``, ``"float8"`` (e4m3fn), any of these with optimum-quanto's leading ``q``
            (``"qint8"``), or a :class:`QType`, which is returned as it is.

    Raises:
        ValueError: the name is not a number type.

    Example:
        >>> qtype("int4").bits
        4
        >>> qtype("qfloat8").name
        'float8_e4m3fn'
    """
    if isinstance(name, QType):
        return name
    # what is no text is no name either, and a list cannot even be looked up
    key = name.removeprefix("q") if isinstance(name, str) else ""
    key = _ALIASES.get(key, key)
    if key not in QTYPES:
        raise ValueError(f"{name!r} is not a number type; choose one of {', '.join(weight_names())}")
    return QTYPES[key]


def weight_names() -> list[str]:
    """Every name that a user may give for weights, sorted.

    Example:
        >>> weight_names()
        ['float8', 'float8_e4m3fn', 'float8_e5m2', 'fp4', 'int2', 'int4', 'int8', 'nf4']
    """
    return sorted([*QTYPES, *_ALIASES])
