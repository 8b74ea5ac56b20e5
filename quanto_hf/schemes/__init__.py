"""Frozen descriptions of how one weight is stored and multiplied.

Imports: ``qtypes``, ``ops``, ``fit``. Never: a module, a model, transformers. Add a scheme: docs/architecture.md.
"""

from dataclasses import fields as dataclass_fields
from typing import Any

from quanto_hf.qtypes import QType, qtype
from quanto_hf.schemes.aqlm import Aqlm, aqlm_by_name, is_aqlm_name
from quanto_hf.schemes.base import Scheme, Tensors, TensorSpec
from quanto_hf.schemes.grouped import GROUP_SIZES, PER_CHANNEL, Affine, Float8, Grouped, Lookup

GROUPED: tuple[type[Grouped], ...] = (Affine, Float8, Lookup)
_ALL: tuple[type[Scheme], ...] = (*GROUPED, Aqlm)
SCHEMES: dict[str, type[Scheme]] = {cls.kind: cls for cls in _ALL}

# What a user gets who names only the number type: (group_size, symmetric). All types of 4 bits then store 4.5 bits per
# weight, scales and zeros included. Why these: docs/accuracy.md.
DEFAULTS: dict[str, tuple[int, bool]] = {
    "int8": (PER_CHANNEL, True),
    "float8_e4m3fn": (PER_CHANNEL, True),
    "float8_e5m2": (PER_CHANNEL, True),
    "int4": (64, False),
    "nf4": (32, True),
    "fp4": (32, True),
    "int2": (64, False),
}


def make_scheme(weights: str | QType, group_size: int | None = None, symmetric: bool | None = None) -> Scheme:
    """The scheme of a number type, or of an AQLM layout.

    Args:
        weights: a name such as ``"int4"``, or ``"aqlm-2x8"`` for 2 codebooks with codes of 8 bits.
        group_size: columns that share a scale, -1 for whole rows; of AQLM columns that share a code. None is the
            default of the type.
        symmetric: None is the default of the type.

    Raises:
        ValueError: the values do not go together.

    Example:
        >>> str(make_scheme("int4")), str(make_scheme("int8", group_size=128)), str(make_scheme("aqlm-2x8"))
        ('int4 g64 asym', 'int8 g128', 'aqlm 2x8 g8')
    """
    if is_aqlm_name(weights):
        return aqlm_by_name(str(weights), group_size, symmetric)
    name = qtype(weights).name
    default_group, default_symmetric = DEFAULTS[name]
    cls = next(cls for cls in GROUPED if name in cls.qtypes)
    return cls(
        name,
        default_group if group_size is None else group_size,
        default_symmetric if symmetric is None else symmetric,
    )


def scheme_from_dict(data: dict[str, Any]) -> Scheme:
    """The scheme that ``Scheme.to_dict`` described.

    Raises:
        ValueError: the kind is not known, or a value is missing, unknown or out of range.
    """
    fields = dict(data)
    kind = fields.pop("kind", None)
    # a list, say, cannot even be looked up
    if not isinstance(kind, str) or kind not in SCHEMES:
        raise ValueError(f"{kind!r} is not a kind of scheme; this version knows {', '.join(sorted(SCHEMES))}")
    # without a value the default of the class would stand for it, which may be another
    absent = [field.name for field in dataclass_fields(SCHEMES[kind]) if field.name not in fields]
    if absent:
        raise ValueError(f"the scheme {data} cannot be read: it has no {', '.join(absent)}")
    try:
        return SCHEMES[kind](**fields)
    except TypeError as error:
        raise ValueError(f"the scheme {data} cannot be read: {error}") from None


__all__ = [
    "DEFAULTS",
    "GROUPED",
    "GROUP_SIZES",
    "PER_CHANNEL",
    "SCHEMES",
    "Affine",
    "Aqlm",
    "Float8",
    "Grouped",
    "Lookup",
    "Scheme",
    "TensorSpec",
    "Tensors",
    "is_aqlm_name",
    "make_scheme",
    "scheme_from_dict",
]
