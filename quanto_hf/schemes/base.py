"""What a scheme is: a frozen description of how one weight is stored and multiplied."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F

from quanto_hf.fit import NO_CONTEXT, Context, Fit
from quanto_hf.ops import (
    TOKEN,
    GroupedWeight,
    Weight,
    dequantize,
    embedding,
    embedding_op,
    expert_linear,
    expert_linear_op,
    linear,
    linear_op,
    linear_rounded,
    linear_rounded_op,
    round_activations,
)
from quanto_hf.ops.kernel import Call
from quanto_hf.ops.registry import Op
from quanto_hf.ops.watched import sizes
from quanto_hf.qtypes import QType, common_names
from quanto_hf.schemes.stored import Tensors, TensorSpec, Trainable

# every scheme by its kind, in the order in which names are looked up
SCHEMES: dict[str, "type[Scheme]"] = {}

S = TypeVar("S", bound="type[Scheme]")


def register_scheme(cls: S) -> S:
    """Class decorator: make a scheme known by its ``kind``, and by the names that it takes."""
    SCHEMES[cls.kind] = cls
    return cls


def with_scales() -> str:
    """The number types of weights that have a scale for each group, for errors."""
    return any_of(common_names())


def any_of(values: Sequence[Any]) -> str:
    """Values in words: "1, 2 or 3"."""
    return ", ".join(map(str, values[:-1])) + f" or {values[-1]}" if len(values) > 1 else str(values[0])


@dataclass(frozen=True)
class Scheme(ABC):
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

    @property
    def signed_scales(self) -> bool:
        """Whether scales may be negative: the numbers of the type reach further down than up, and the sign of a scale
        says to which side the longer one points."""
        return False

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

    # ----------------------------------------------------------------------------------------------- what it takes

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be stored, or None."""
        return None

    def refuses_fit(self, fit: "Fit | str | None" = None) -> str | None:
        """Why no float weight can be quantized so, in one sentence, or None. It is asked before a model is changed.

        Args:
            fit: of :meth:`quantize`.
        """
        return None

    def refuses_training(self) -> str | None:
        """Why weights cannot be rounded in every step of training, or None."""
        return None

    def refuses_learning(self) -> str | None:
        """Why scales cannot be trained, in one sentence, or None."""
        return f"{self} weights have no scales that can be learned; leave out learn_scales, or choose {with_scales()}"

    def wants_moments(self, fit: "Fit | str | None" = None) -> bool:
        """Whether :meth:`quantize` with this fit makes use of ``Context.moment``."""
        return False

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

    # ----------------------------------------------------------------------------------------------- making

    @abstractmethod
    def quantize(
        self, weight: torch.Tensor, fit: "Fit | str | None" = None, context: Context = NO_CONTEXT
    ) -> dict[str, torch.Tensor]:
        """The stored tensors of a float weight, on its device.

        Args:
            weight: float32, bfloat16 or float16, shape (..., out_features, in_features).
            fit: what finds scale and zero; None is the default of the scheme.
            context: what is known besides the weight: second moments of the inputs, a seed, who is told of progress.

        Raises:
            ValueError: the weight has NaN or infinite values, or no columns.
        """

    def workspace_bytes(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        fit: "Fit | str | None" = None,
        *,
        device: str = "cpu",
        calibrated: bool = False,
    ) -> int:
        """Most bytes of temporaries that :meth:`quantize` takes besides the weight, its second moment and the result;
        0 where that is a few MB.

        Args:
            shape: of the weight, (out_features, in_features).
            dtype: of the weight.
            fit: of :meth:`quantize`.
            device: type of the device: "cpu", "cuda".
            calibrated: whether a second moment is given.
        """
        return 0

    def work(self, shape: tuple[int, int], calibrated: bool = False) -> float:
        """How much there is to do to quantize a weight, in a unit of the scheme: for bars of progress."""
        return float(prod(shape))

    def speed(self, calibrated: bool = False) -> float | None:
        """How much of :meth:`work` this machine does in a second, measured now; None: so much that it does not
        count."""
        return None

    def trainable(self, tensors: Tensors) -> "Trainable | None":
        """What of a stored weight can be trained by gradient while its codes stay, or None: nothing."""
        return None

    def encode(
        self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The stored tensors of a float weight with scales that are given, and not found by a fit.

        Args:
            weight: float, shape (..., out_features, in_features).
            scale: in the shape of the stored one, finite, and not 0 once it is rounded to its stored dtype, which is
                done first. Positive, but for schemes with :attr:`signed_scales`.
            zero: as ``scale``, of asymmetric schemes.

        Raises:
            ValueError: scales do not fit, or the scheme has none.
        """
        raise ValueError(f"{self} weights have no scales that can be given; choose {with_scales()}")

    def read_scale(self, stored: torch.Tensor) -> torch.Tensor:
        """The float32 numbers of a stored scale or zero, of schemes whose scales can be learned."""
        return stored.float()

    def fake_quantize(
        self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The numbers that :meth:`encode` stores, as float32, with gradients to weight, scale and zero.

        Args:
            weight: float, shape (out_features, in_features).
            scale: as of :meth:`encode`.
            zero: as of :meth:`encode`.

        Raises:
            ValueError: as of :meth:`encode`.
        """
        raise ValueError(self.refuses_learning())

    # ----------------------------------------------------------------------------------------------- products

    def weight(self, tensors: Tensors, in_features: int) -> Weight | None:
        """The stored tensors as the value that the ops take, or None: no op knows it, and the products are those of the
        float weight. A subclass has this, or :meth:`dequantize`."""
        return None

    def dequantize(self, tensors: Tensors, in_features: int, dtype: torch.dtype) -> torch.Tensor:
        """The float weight, shape (..., out_features, in_features)."""
        weight = self.weight(tensors, in_features)
        if weight is None:
            raise NotImplementedError(f"{type(self).__name__} has neither weight() nor dequantize()")
        return dequantize(weight, dtype)

    def linear(self, x: torch.Tensor, tensors: Tensors, bias: torch.Tensor | None) -> torch.Tensor:
        """``x @ weight.T + bias`` for a weight of 2 dimensions; shape (..., out_features), dtype of ``x``."""
        columns = _last(x)
        weight = self.weight(tensors, columns)
        if weight is None:
            return F.linear(x, self.dequantize(tensors, columns, x.dtype), bias)
        return linear(x, weight, bias)

    def linear_rounded(
        self,
        x: torch.Tensor,
        tensors: Tensors,
        bias: torch.Tensor | None,
        activations: QType,
        x_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """:meth:`linear` of x rounded to ``activations``, without gradients.

        Args:
            x_scale: the static scale of x, one float32 number, or None: scales are found from x, for as many columns as
                :meth:`activation_group` says.
        """
        weight = self.weight(tensors, _last(x))
        if weight is None:
            rounded = round_activations(x, activations, self.activation_group(activations), x_scale)
            return self.linear(rounded.to(x.dtype), tensors, bias)
        return linear_rounded(x, weight, bias, activations.name, x_scale)

    def rows(self, tensors: Tensors, index: torch.Tensor, in_features: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows of the float weight, as an embedding reads them; the weight has 2 dimensions.

        Args:
            index: integer row numbers, any shape.

        Returns:
            Shape (*index.shape, in_features).

        Raises:
            IndexError: there is no such row; negative numbers do not count from the end.
        """
        weight = self.weight(tensors, in_features)
        if weight is None:
            return F.embedding(index.to(torch.int64), self.dequantize(tensors, in_features, dtype))
        return embedding(index, weight, dtype)

    def expert_linear(
        self, x: torch.Tensor, experts: torch.Tensor, tensors: Tensors, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Each row of ``x`` times the weight of its own expert, as :func:`quanto_hf.ops.expert_linear` says, for a
        weight of shape (experts, out_features, in_features).

        Raises:
            ValueError: the scheme has no such product.
        """
        weight = self.weight(tensors, _last(x))
        if not isinstance(weight, GroupedWeight):
            raise ValueError(f"{self} weights are not multiplied by expert; choose {with_scales()}")
        return expert_linear(x, experts, weight, bias)

    def bind(
        self,
        tensors: Tensors,
        in_features: int,
        activations: str | None = None,
        x_scale: torch.Tensor | None = None,
    ) -> Call | None:
        """``call(x, bias)``, the same as :meth:`linear` with everything about these tensors looked up in advance.

        Args:
            activations: None, or the number type to which x is rounded first, as :meth:`activation_group` says.
            x_scale: the static scale of x, 1 element, or None: scales are found when x comes.

        Returns:
            None if there is nothing to look up. The call itself answers None where it does not serve (another device,
            a gradient to follow, tensors that have moved); :meth:`linear` always does.
        """
        if activations is None:
            return self._bound(linear_op, tensors, in_features)
        return self._bound(linear_rounded_op, tensors, in_features, activations, x_scale)

    def bind_rows(self, tensors: Tensors, in_features: int) -> Call | None:
        """``call(index, dtype)``, the same as :meth:`rows`; see :meth:`bind`."""
        return self._bound(embedding_op, tensors, in_features)

    def bind_experts(self, tensors: Tensors, in_features: int) -> Call | None:
        """``call(x, experts, bias)``, the same as :meth:`expert_linear`; see :meth:`bind`."""
        return self._bound(expert_linear_op, tensors, in_features)

    def _bound(self, op: Op, tensors: Tensors, in_features: int, *rest: Any) -> Call | None:
        weight, held = self.weight(tensors, in_features), {id(tensor) for tensor in tensors.values()}
        # a call that knows other tensors than the stored ones would not see that these change
        if weight is None or any(tensor is not None and id(tensor) not in held for tensor in weight.stored):
            return None
        return op.bind(weight, *rest)

    def activation_group(self, activations: QType) -> int:
        """Columns of x that share a scale when x is rounded to ``activations``; -1 for all of a row."""
        return TOKEN

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


def _last(x: torch.Tensor) -> int:
    """Columns of x; 0 for a number, which no product takes."""
    return sizes(x)[-1] if x.dim() else 0
