"""What a scheme is: a frozen description of how one weight is stored and multiplied."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from quanto_hf.fit import Fit
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
from quanto_hf.ops.registry import Call, Op
from quanto_hf.ops.watched import sizes
from quanto_hf.qtypes import QType

Tensors = Mapping[str, torch.Tensor]

# the number types of weights that have a scale for each group
WITH_SCALES = "int8, int4, int2, float8, nf4 or fp4"


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Scheme(ABC):
    """How one weight of shape (..., out_features, in_features) is stored and multiplied.

    Subclasses are frozen dataclasses, hashable, with a ``kind`` that is their name in config.json.
    """

    kind: ClassVar[str]
    # whether rows are quantized each on its own, so that the stored tensors of some rows are rows of those of all
    by_rows: ClassVar[bool] = True
    # the stored tensor that every value of the weight is a multiple of
    scale_name: ClassVar[str] = "scale"

    @property
    def signed_scales(self) -> bool:
        """Whether scales may be negative: the numbers of the type reach further down than up, and the sign of a scale
        says to which side the longer one points."""
        return False

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the stored tensors, as :meth:`tensors` gives them."""

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
        return f"{self} weights have no scales that can be learned; leave out learn_scales, or choose {WITH_SCALES}"

    @abstractmethod
    def tensors(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Names, shapes and dtypes of the stored tensors: the one truth for empty modules, saved keys, device maps
        and reports.

        Args:
            shape: shape of the float weight, (..., out_features, in_features).
            dtype: dtype of the float weight.
        """

    @abstractmethod
    def quantize(self, weight: torch.Tensor, fit: "Fit | str | None" = None) -> dict[str, torch.Tensor]:
        """The stored tensors of a float weight, on its device.

        Args:
            weight: float32, bfloat16 or float16, shape (..., out_features, in_features).
            fit: what finds scale and zero; None is the default of the scheme.

        Raises:
            ValueError: the weight has NaN or infinite values, or no columns.
        """

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
        raise ValueError(f"{self} weights have no scales that can be given; choose {WITH_SCALES}")

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
            raise ValueError(f"{self} weights are not multiplied by expert; choose {WITH_SCALES}")
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

    def at_ends(self, tensors: Tensors, in_features: int) -> torch.Tensor | None:
        """Which weights have the smallest or the largest code there is, bool of shape (..., out_features, in_features);
        None if codes have no order."""
        return None

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Bytes of all stored tensors of a weight."""
        return sum(spec.nbytes for spec in self.tensors(shape, dtype).values())

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """A description in JSON types, with ``kind``; :func:`quanto_hf.schemes.scheme_from_dict` reads it."""

    @abstractmethod
    def __str__(self) -> str:
        """A short name for tables, such as ``int4 g64``."""


def _last(x: torch.Tensor) -> int:
    """Columns of x; 0 for a number, which no product takes."""
    return sizes(x)[-1] if x.dim() else 0
