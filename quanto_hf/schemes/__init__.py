"""Frozen descriptions of how one weight is stored and multiplied.

Imports: ``qtypes``, ``ops``, ``fit``. Never: a module, a model, transformers. Add a scheme: docs/architecture.md.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields as dataclass_fields
from typing import Any

from quanto_hf.qtypes import QType, qtype, weight_names
from quanto_hf.schemes.base import SCHEMES, Scheme, register_scheme
from quanto_hf.schemes.grouped import GROUP_SIZES, PER_CHANNEL, Grouped
from quanto_hf.schemes.numbers import Affine, Float8, Lookup

from quanto_hf.schemes.aqlm import Aqlm  # isort: skip  # names are looked up in the order of registration
from quanto_hf.schemes.stored import Tensors, TensorSpec, Trainable


def class_of(weights: Any) -> type[Scheme] | None:
    """The class of schemes that knows this name, or None."""
    known = (cls for cls in SCHEMES.values() if isinstance(weights, str) and cls.knows(weights))
    return next(known, None)


def names_of_schemes() -> list[str]:
    """Names that a user may give for weights: number types, and examples of what else there is.

    Example:
        >>> names_of_schemes()[-3:]
        ['aqlm-1x8', 'aqlm-2x8', 'aqlm-1x16']
    """
    return [*weight_names(), *(name for cls in SCHEMES.values() for name in cls.examples)]


def make_scheme(weights: str | QType, group_size: int | None = None, symmetric: bool | None = None) -> Scheme:
    """The scheme of a number type, or of another name that a class of schemes knows.

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
    name = weights.name if isinstance(weights, QType) else weights
    # the error of a name that nobody knows is that of number types
    cls = class_of(name) or class_of(qtype(name).name)
    assert cls is not None
    return cls.named(name, group_size, symmetric)


def notes(layers: Mapping[str, tuple[Scheme, Mapping[str, TensorSpec]]]) -> tuple[str, ...]:
    """What schemes say about layers that are, or are to be, stored so (:meth:`Scheme.notes`).

    Args:
        layers: name -> scheme, and the stored tensors by the names of the scheme.
    """
    kinds: Iterable[type[Scheme]] = dict.fromkeys(type(scheme) for scheme, _ in layers.values())
    return tuple(
        note
        for cls in kinds
        for note in cls.notes({name: layer for name, layer in layers.items() if type(layer[0]) is cls})
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
    "Trainable",
    "class_of",
    "make_scheme",
    "names_of_schemes",
    "notes",
    "register_scheme",
    "scheme_from_dict",
]
