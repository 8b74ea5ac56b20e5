"""The attention that is quantized inside: its projections have int8 weights, the products between them are float."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from quanto_hf.eager.custom import register
from quanto_hf.eager.inside import QuantizedInside, linear_of
from quanto_hf.eager.modules import FloatFunctional
from quanto_hf.eager.stubs import DeQuantStub, QuantStub

__all__ = ["ObservedMultiheadAttention", "QuantizedMultiheadAttention"]


class ObservedMultiheadAttention(QuantizedInside):
    """``nn.MultiheadAttention`` with projections that can be observed, and copies of the weights."""

    # nn.TransformerEncoderLayer asks for these before it takes a way of its own around this module
    _qkv_same_embed_dim = False
    in_proj_bias = None

    def __init__(self, mod: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = mod.embed_dim, mod.num_heads, mod.head_dim
        self.batch_first, self.dropout, self.add_zero_attn = mod.batch_first, mod.dropout, mod.add_zero_attn
        if mod._qkv_same_embed_dim:
            weights: Any = mod.in_proj_weight.chunk(3)
        else:
            weights = (mod.q_proj_weight, mod.k_proj_weight, mod.v_proj_weight)
        biases: Any = (None, None, None) if mod.in_proj_bias is None else mod.in_proj_bias.chunk(3)
        linears = [_copied(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        self.linear_Q, self.linear_K, self.linear_V = linears
        self.out_proj = _copied(mod.out_proj.weight, mod.out_proj.bias)
        self.bias_k, self.bias_v = mod.bias_k, mod.bias_v
        self.q_scaling_product = FloatFunctional()
        self.quant_attn_output, self.quant_attn_output_weights = QuantStub(), QuantStub()
        self.dequant_q, self.dequant_k, self.dequant_v = DeQuantStub(), DeQuantStub(), DeQuantStub()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The attention of ``query`` over ``key`` and ``value``, with the arguments of ``nn.MultiheadAttention``.

        Args:
            query: shape (length, batch, embed_dim), with the batch first if ``batch_first`` is set, or without a batch.
            key: the same with a length of its own, and ``kdim`` columns.
            value: of the length of ``key``, with ``vdim`` columns.
            key_padding_mask: shape (batch, key length): True, or what is added to scores, at keys to leave out.
            need_weights: return the weights too.
            attn_mask: shape (length, key length), or (batch * heads, length, key length).
            average_attn_weights: the mean of the heads, and not the weights of each.
            is_causal: a hint that ``attn_mask`` is the causal mask.

        Returns:
            The output, of the shape of ``query``; and weights of shape (batch, length, key length), with the heads in
            the second place unless they are averaged, or None.

        Raises:
            ValueError: ``is_causal`` without ``attn_mask``.
        """
        single = query.dim() == 2
        if single:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask; give the mask as well")
        length, batch, _ = query.shape
        q = self.q_scaling_product.mul_scalar(self.linear_Q(query), 1 / math.sqrt(self.head_dim))
        k, v = self.linear_K(key), self.linear_V(value)
        extra = 0
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([x, bias.to(x.dtype).expand(1, batch, -1)])
                for x, bias in ((k, self.bias_k), (v, self.bias_v))
            )
            extra += 1
        q, k, v = (self._heads(x) for x in (self.dequant_q(q), self.dequant_k(k), self.dequant_v(v)))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
            extra += 1
        scores = q @ k.transpose(-1, -2)
        for mask in (_shaped(attn_mask, batch, self.num_heads), _padding(key_padding_mask)):
            if mask is not None:
                scores = scores + _additive(F.pad(mask, (0, extra)), scores.dtype)
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        out = (weights @ v).permute(2, 0, 1, 3).reshape(length, batch, self.embed_dim)
        out = self.out_proj(self.quant_attn_output(out))
        weights = self.quant_attn_output_weights(weights)
        if single:
            out = out.squeeze(1)
        elif self.batch_first:
            out = out.transpose(0, 1)
        if not need_weights:
            return out, None
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights.squeeze(0) if single else weights

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """(length, batch, embed_dim) to (batch, heads, length, head_dim)."""
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, self.head_dim).permute(1, 2, 0, 3)


def _copied(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    return linear_of(weight.detach().clone(), None if bias is None else bias.detach().clone())


def _shaped(mask: torch.Tensor | None, batch: int, heads: int) -> torch.Tensor | None:
    """A mask of 2 dimensions is that of all heads, one of 3 has a part for each."""
    if mask is None or mask.dim() == 2:
        return mask
    return mask.view(batch, heads, *mask.shape[1:])


def _padding(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask[:, None, None, :]


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)


class QuantizedMultiheadAttention(ObservedMultiheadAttention):
    """Attention whose projections have int8 weights and outputs on grids."""


register(nn.MultiheadAttention, ObservedMultiheadAttention, QuantizedMultiheadAttention)
