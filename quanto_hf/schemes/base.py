"""What a scheme is: a frozen description of how one weight is stored and multiplied."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, ClassVar, TypeVar

import torch

from quanto_hf.schemes.making import Making
from quanto_hf.schemes.products import Products
from quanto_hf.schemes.stored import Tensors, TensorSpec

# every scheme by its kind, in the order in which names are looked up
SCHEMES: dict[str, "type[Scheme]"] = {}

S = TypeVar("S", bound="type[Scheme]")


def register_scheme(cls: S) -> S:
    """Class decorator: make a scheme known by its ``kind``, and by the names that it takes."""
    SCHEMES[cls.kind] = cls
    return cls


@dataclass(frozen=True)
class Scheme(Making, Products):
    """How one weight of shape (..., out_features, in_features) is stored and multiplied.

    Subclasses are frozen dataclasses of JSON types, hashable, with a ``kind`` that is their name in config.json and
    the decorator :func:`register_scheme`. ``tensors`` in the signatures below are the stored tensors: name -> tensor,
    with the names, shapes and dtypes of :meth:`tensors`.
    """

    kind: ClassVar[str]
    # names that users may give, for errors and for what shows schemes where none is named; how further ones are spelled
    examples: ClassVar[tuple[str, ...]] = ()
    spelling: ClassVar[str] = ""
    # whether rows are quantized each on its own, so that the stored tensors of some rows are rows of those of all
    by_rows: ClassVar[bool] = True
    # the stored tensor that every value of the weight is a multiple of
    scale_name: ClassVar[str] = "scale"

    # ----------------------------------------------------------------------------------------------- names

    @classmethod
    @abstractmethod
    def knows(cls, name: str) -> bool:
        """Whether this is a name of such schemes, with any group size."""

    @classmethod
    @abstractmethod
    def named(cls, name: str, group_size: int | None = None, symmetric: bool | None = None) -> "Scheme":
        """The scheme of a name that the class :meth:`knows`.

        Args:
            group_size: columns that share a scale, or a code; None is the default of the name.
            symmetric: whether there is no zero; None is the default of the name.

        Raises:
            ValueError: the values do not go together.
        """

    @classmethod
    @abstractmethod
    def refuses_group_size(cls, name: str, group_size: Any) -> str | None:
        """Why no scheme of this name has such groups, in one sentence, or None. ``group_size`` is not None."""

    @abstractmethod
    def asked(self) -> dict[str, Any]:
        """``weights``, ``group_size`` and, where it has a choice, ``symmetric``: the arguments of
        :func:`quanto_hf.schemes.make_scheme` that make this scheme, also those of a QuantoConfig."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the stored tensors, as :meth:`tensors` gives them."""

    @property
    def float_names(self) -> tuple[str, ...]:
        """Names of the stored tensors that have the float dtype of the weight."""
        return ()

    # ----------------------------------------------------------------------------------------------- stored tensors

    @abstractmethod
    def tensors(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Names, shapes and dtypes of the stored tensors: the one truth for empty modules, saved keys, device maps
        and reports.

        Args:
            shape: shape of the float weight, (..., out_features, in_features).
            dtype: dtype of the float weight.
        """

    @abstractmethod
    def candidates(self, stored: Mapping[str, TensorSpec]) -> list[TensorSpec]:
        """Shapes and float dtypes that a weight with such stored tensors may have, the most columns first: the inverse
        of :meth:`tensors`, which the last byte of a row may leave open. Empty if there is none.

        Args:
            stored: name -> shape and dtype; names may be missing, and anything may be wrong.
        """

    def weight_of(self, stored: Mapping[str, TensorSpec]) -> TensorSpec | None:
        """Shape and float dtype of the weight with these stored tensors, or None: they are not those of one."""
        found = self.candidates(stored)
        return next((spec for spec in found if self.tensors(spec.shape, spec.dtype) == dict(stored)), None)

    @classmethod
    def notes(cls, layers: "Mapping[str, tuple[Any, Mapping[str, TensorSpec]]]") -> tuple[str, ...]:
        """Sentences that a user is told about weights that are to be stored, or are stored, so.

        Args:
            layers: name of a layer -> its scheme, which is of this class, and its stored tensors.
        """
        return ()

    def scaled(self, tensors: Tensors, factor: float) -> dict[str, torch.Tensor] | None:
        """The stored tensors that change where the weight is multiplied by a power of two, or None: they cannot hold
        it without a loss."""
        scale = tensors[self.scale_name]
        made = scale * factor
        return {self.scale_name: made} if torch.equal(made / factor, scale) else None

    # ----------------------------------------------------------------------------------------------- descriptions

    def at_ends(self, tensors: Tensors, in_features: int) -> torch.Tensor | None:
        """Which weights have the smallest or the largest code there is, bool of shape (..., out_features, in_features);
        None if codes have no order."""
        return None

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Bytes of all stored tensors of a weight."""
        return sum(spec.nbytes for spec in self.tensors(shape, dtype).values())

    def bits(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float16) -> float:
        """Bits per weight, scales and all other stored tensors included."""
        return 8 * self.nbytes(shape, dtype) / prod(shape)

    def to_dict(self) -> dict[str, Any]:
        """A description in JSON types, with ``kind``; :func:`quanto_hf.schemes.scheme_from_dict` reads it."""
        return {"kind": self.kind, **asdict(self)}

    @abstractmethod
    def __str__(self) -> str:
        """A short name for tables, such as ``int4 g64``."""
