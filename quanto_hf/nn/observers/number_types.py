"""What observers call a number type and a quantization scheme: names, whatever the user gave."""

from dataclasses import dataclass
from typing import Any

SCHEMES = (
    "per_tensor_affine",
    "per_tensor_symmetric",
    "per_channel_affine",
    "per_channel_symmetric",
    "per_channel_affine_float_qparams",
)


@dataclass(frozen=True)
class Number:
    """A number type that a range can be mapped to.

    Args:
        name: without ``torch.``.
        low: smallest code; of 8-bit floats the smallest number.
        high: largest code.
        bits: of one code.
        middle: the zero point of a symmetric grid.
    """

    name: str
    low: int
    high: int
    bits: int
    middle: int = 0

    @property
    def is_float(self) -> bool:
        """Whether codes are 8-bit floats."""
        return self.name.startswith("float8")


def _signed(name: str, bits: int) -> Number:
    return Number(name, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, bits)


def _unsigned(name: str, bits: int, middle: int) -> Number:
    return Number(name, 0, 2**bits - 1, bits, middle)


NUMBERS = {
    kind.name: kind
    for kind in (
        _signed("qint8", 8),
        _signed("int8", 8),
        _unsigned("quint8", 8, 128),
        _unsigned("uint8", 8, 128),
        # as in torch, the middle of 4 bits is 0
        _unsigned("quint4x2", 4, 0),
        _signed("int16", 16),
        _unsigned("uint16", 16, 2**15),
        _signed("qint32", 32),
        _signed("int32", 32),
        Number("float8_e4m3fn", -448, 448, 8),
        Number("float8_e5m2", -57344, 57344, 8),
    )
}


def dtype_name(dtype: Any) -> str:
    """The name of a number type that is given as a torch dtype or by name.

    Raises:
        TypeError: it is neither.

    Example:
        >>> dtype_name(torch.int8), dtype_name("quint8"), dtype_name("torch.float16")
        ('int8', 'quint8', 'float16')
    """
    # a quantized dtype is compared by its name, since torch is about to drop these objects
    if not isinstance(dtype, str) and type(dtype).__name__ != "dtype":
        raise TypeError(f"dtype={dtype!r} is neither a torch dtype nor a name such as 'quint8'")
    return str(dtype).removeprefix("torch.")


def number(dtype: Any) -> Number:
    """The number type of a dtype or name.

    Raises:
        ValueError: a range cannot be mapped to it.
    """
    name = dtype_name(dtype)
    if name not in NUMBERS:
        raise ValueError(f"an observer of ranges does not know dtype={name!r}; choose one of {', '.join(NUMBERS)}")
    return NUMBERS[name]


def scheme_name(qscheme: Any) -> str:
    """The name of a quantization scheme that is given as a torch object or by name.

    Raises:
        ValueError: there is no such scheme.
    """
    name = str(qscheme).removeprefix("torch.")
    if name not in SCHEMES:
        raise ValueError(f"qscheme={qscheme!r} is not known; choose one of {', '.join(SCHEMES)}")
    return name
