"""Embeddings with stored weights. Their output is a float tensor that is not rounded."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from quanto_hf.eager.modules.errors import QConfigError
from quanto_hf.eager.modules.kept import bare
from quanto_hf.eager.modules.stored_weights import StoredWeight, observer_for, weight_observer
from quanto_hf.nn.qembedding import rows_of_bags


class StoredEmbedding(StoredWeight):
    """What both embeddings share."""

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> "StoredEmbedding":
        """The quantized embedding of a float, or fake-quantized, one.

        Raises:
            QConfigError: the qconfig has no float zero points, or another number type than quint8 or quint4x2; or the
                float module changes its weight in the forward pass (``max_norm``).
        """
        fake = hasattr(mod, "weight_fake_quant")
        observer: Any = mod.weight_fake_quant if fake else observer_for(mod)
        if observer.qscheme != "per_channel_affine_float_qparams":
            raise QConfigError(
                f"{type(mod).__name__} is quantized with float_qparams_weight_only_qconfig, or another one whose "
                f"weight observer has the scheme per_channel_affine_float_qparams; this one has {observer.qscheme}"
            )
        if observer.dtype not in ("quint8", "quint4x2"):
            raise QConfigError(f"{type(mod).__name__} is quantized to quint8 or quint4x2, not to {observer.dtype}")
        if mod.max_norm is not None:
            raise QConfigError(f"{type(mod).__name__} has max_norm, which changes its weight; a stored one is fixed")
        new: Any = bare(cls, mod)
        new.hold("weight", mod.weight, weight_observer(mod, use_precomputed_fake_quant))
        return new


class Embedding(StoredEmbedding, nn.Embedding):
    """``nn.Embedding`` with stored weights: only the rows that are asked for are made float."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Rows of the weight, shape (*input.shape, embedding_dim)."""
        return self.rows_of("weight", input)


class EmbeddingBag(StoredEmbedding, nn.EmbeddingBag):
    """``nn.EmbeddingBag`` with stored weights."""

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sums, means or maxima of bags of rows; see ``nn.EmbeddingBag``."""
        table, index, padding = rows_of_bags(partial(self.rows_of, "weight"), input, self.padding_idx)
        if per_sample_weights is not None:
            per_sample_weights = per_sample_weights.to(table.dtype)
        return F.embedding_bag(
            index, table, offsets, mode=self.mode, per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset, padding_idx=padding,
        )  # fmt: skip
