"""How a stored weight is read and multiplied: by the ops, where they know it as a value."""

from typing import Any

import torch
import torch.nn.functional as F

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
from quanto_hf.qtypes import QType
from quanto_hf.schemes.making import with_scales
from quanto_hf.schemes.stored import Tensors


class Products:
    """The part of :class:`quanto_hf.schemes.Scheme` that computes with stored weights. ``tensors`` are the stored
    tensors, by the names of the scheme."""

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


def _last(x: torch.Tensor) -> int:
    """Columns of x; 0 for a number, which no product takes."""
    return sizes(x)[-1] if x.dim() else 0
