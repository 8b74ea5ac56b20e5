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
        aliases: other names that users may write.
        group_size: columns of a weight that share a scale where the user names no number; -1 is the whole row.
        symmetric: whether weights have no zero point where the user does not say.
        fit: name of the fit that finds scales where the user names none.
        start_ratios: where the search of the mse fits starts: shares of the range of a group that are kept. With 1,
            the full range, no group ends worse than minmax has it.
        native: the number of the code layout in ``ops/cpu/csrc/common.h``, or None: kernels in plain torch only.
        common: whether the command line shows the type where the user names none.
    """

    name: str
    bits: int
    kind: str
    qmin: float
    qmax: float
    storage: torch.dtype = torch.uint8
    float_dtype: torch.dtype | None = None
    values: tuple[float, ...] | None = None
    aliases: tuple[str, ...] = ()
    group_size: int = -1
    symmetric: bool = True
    fit: str = "absmax"
    start_ratios: tuple[float, ...] = (0.98, 1.0)
    native: int | None = None
    common: bool = True

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


QTYPES: dict[str, QType] = {}
# other names -> the name of the type
_ALIASES: dict[str, str] = {}


def register_qtype(kind: QType) -> QType:
    """Make a number type known by its names: everything that lists types has it from then on.

    Raises:
        ValueError: a name is taken by another type.

    Example:
        >>> int3 = QType("int3", 3, "int", -4, 3, group_size=64, symmetric=False, fit="mse", start_ratios=(0.8, 1.0))
        >>> register_qtype(int3) is qtype("int3")
        True
        >>> del QTYPES["int3"]  # only here, so that other examples do not list it
    """
    for name in (kind.name, *kind.aliases):
        taken = QTYPES.get(_ALIASES.get(name, name))
        if taken is not None and taken != kind:
            raise ValueError(f"{name!r} is the name of another number type: {taken!r}")
    QTYPES[kind.name] = kind
    _ALIASES.update(dict.fromkeys(kind.aliases, kind.name))
    return kind


# All types of 4 bits store 4.5 bits per weight by default, scales and zeros included. Why these defaults, and these
# fits, the best ones that need no data: docs/accuracy.md. The optimum of the ratio for Gaussian values in groups of 64
# is about 0.65 for 4 levels and 0.95 for 16 levels.
_4_BITS = (0.8, 0.9, 1.0)
# int8 is symmetric without -128, so that a weight and its negative have mirrored codes
qint8 = register_qtype(QType("int8", 8, "int", -127, 127, storage=torch.int8, native=0))
qfloat8_e4m3fn = register_qtype(
    QType("float8_e4m3fn", 8, "float", -448.0, 448.0, float_dtype=torch.float8_e4m3fn, aliases=("float8",), native=1)
)
qfloat8_e5m2 = register_qtype(
    QType("float8_e5m2", 8, "float", -57344.0, 57344.0, float_dtype=torch.float8_e5m2, native=2, common=False)
)
qfloat8 = qfloat8_e4m3fn
qint4 = register_qtype(
    QType("int4", 4, "int", -8, 7, group_size=64, symmetric=False, fit="mse", start_ratios=_4_BITS, native=3)
)
qnf4 = register_qtype(
    QType("nf4", 4, "table", -1.0, 1.0, values=NF4_VALUES, group_size=32, fit="mse", start_ratios=_4_BITS, native=3)
)
qfp4 = register_qtype(
    QType("fp4", 4, "table", -6.0, 6.0, values=FP4_VALUES, group_size=32, fit="mse", start_ratios=_4_BITS, native=3)
)
qint2 = register_qtype(
    QType(
        "int2", 2, "int", -2, 1,
        group_size=64, symmetric=False, fit="mse_gain", start_ratios=(0.5, 0.65, 0.8, 1.0), native=4,
    )
)  # fmt: skip


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


def common_names() -> list[str]:
    """The names of the types that are shown where none is named, the shortest name of each, the most exact first.

    Example:
        >>> common_names()
        ['int8', 'float8', 'int4', 'nf4', 'fp4', 'int2']
    """
    return [min((kind.name, *kind.aliases), key=len) for kind in QTYPES.values() if kind.common]
