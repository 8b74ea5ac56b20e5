"""Embeddings whose weight is quantized: only the rows that are read are dequantized."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from quanto_hf.nn.bound_call import Call
from quanto_hf.nn.registry import register_qmodule
from quanto_hf.nn.rounded import RoundedModule
from quanto_hf.ops.watched import recording

CONSTANTS = ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


class QuantizedTable(RoundedModule):
    """Mixin of embeddings with a quantized weight, whose rows are the rows that are stored."""

    rounds_inputs: ClassVar[bool] = False
    on_request: ClassVar[str] = "with embeddings='int8' or the like, or where a pattern names it"
    # of subclasses that scale, offset or normalise
    keeps_forward: ClassVar[bool] = True
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None

    @classmethod
    def refuses_module(cls, module: nn.Module) -> str | None:
        """Why an embedding cannot be quantized, or None: one that renormalises its weight when it is read writes it."""
        if module.max_norm is None:
            return None
        return (
            f"{module} renormalises the rows that it reads (max_norm), and quantized rows are not written; "
            f"set max_norm=None, or leave it float"
        )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(num_embeddings, embedding_dim)"""
        return (self.num_embeddings, self.embedding_dim)

    def _fast_rows(self, index: torch.Tensor) -> torch.Tensor | None:
        """What the bound call gives, or None if it does not serve, as before the weight is packed."""
        if recording():
            return None
        call = self.bound_call()
        return None if call is None else call(index, self.weight_dtype)

    def _rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of the FROZEN weight, shape (*index.shape, embedding_dim), without the bound call."""
        return self.scheme.rows(self.tensors(), index, self.embedding_dim, self.weight_dtype)

    def _read(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of the FROZEN weight, shape (*index.shape, embedding_dim)."""
        out = self._fast_rows(index)
        return self._rows(index) if out is None else out

    def _bind_stored(self, tensors: Mapping[str, torch.Tensor]) -> Call | None:
        """The call that reads rows of these stored tensors, or None where there is none."""
        return self.scheme.bind_rows(tensors, self.embedding_dim)


@register_qmodule(nn.Embedding)
class QEmbedding(QuantizedTable, nn.Embedding):  # type: ignore[misc]
    """``nn.Embedding`` with a quantized weight.

    Example:
        >>> from quanto_hf.schemes import make_scheme
        >>> layer = QEmbedding.from_module(nn.Embedding(100, 64), make_scheme("int4"))
        >>> layer.freeze()
        >>> layer(torch.tensor([3, 99])).shape
        torch.Size([2, 64])
    """

    constants: ClassVar[tuple[str, ...]] = CONSTANTS

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The rows with these numbers, shape (*input.shape, embedding_dim)."""
        out = self._fast_rows(input)
        if out is not None:
            return out
        if self.is_frozen:
            return self._rows(input)
        weight = self.round_weight(self.sources()) if self.rounding else self.weight
        return F.embedding(input, weight, self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse)


def rows_of_bags(
    read: Callable[[torch.Tensor], torch.Tensor], index: torch.Tensor, padding: int | None
) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    """The rows that bags read as a table, in the order in which they are read, and a row for padding.

    Args:
        read: gives the rows of the weight for an index of one dimension.
        index: of any shape.
        padding: the row that is left out of the bags, if there is one.

    Returns:
        The table, the index into it in the shape of ``index``, and the row of it that is padding.
    """
    flat = index.reshape(-1)
    table, count = read(flat), flat.numel()
    places = torch.arange(count, device=flat.device, dtype=flat.dtype)
    if padding is None:
        return table, places.view_as(index), None
    # not torch.cat, which autocast refuses for bfloat16 where it is on for float16
    table = F.pad(table, (0, 0, 0, 1))
    return table, torch.where(flat == padding, count, places).view_as(index), count


@register_qmodule(nn.EmbeddingBag)
class QEmbeddingBag(QuantizedTable, nn.EmbeddingBag):
    """``nn.EmbeddingBag`` with a quantized weight."""

    constants: ClassVar[tuple[str, ...]] = (*CONSTANTS, "mode", "include_last_offset")

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The sum, mean or maximum of the rows of each bag, shape (bags, embedding_dim)."""
        index, padding = input, self.padding_idx
        if self.is_frozen:
            table, index, padding = rows_of_bags(self._read, input, padding)
        else:
            table = self.round_weight(self.sources()) if self.rounding else self.weight
        return F.embedding_bag(
            index, table, offsets, mode=self.mode, sparse=self.sparse and not self.is_frozen,
            scale_grad_by_freq=self.scale_grad_by_freq and not self.is_frozen, per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset, padding_idx=padding,
        )  # fmt: skip
