"""torch's own attention with quantized projections."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from quanto_hf.nn.qlinear import QLinear
from quanto_hf.nn.qweight import QuantizedWeight
from quanto_hf.nn.registry import LOAD, QUANTIZE, register_qmodule
from quanto_hf.nn.rounded import autocasts
from quanto_hf.nn.slots import Slot
from quanto_hf.nn.weight_view import WeightView
from quanto_hf.ops.watched import recording

PACKED, SEPARATE = "in_proj_weight", ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def _passed_through(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **(kwargs or {}))


class _Watched(torch.Tensor):
    """A tensor with a ``__torch_function__``, which does nothing. torch's fast paths of attention and of encoder layers
    read the weights of their parts, and take none that has one: they would run no kernel of a packed layer, and
    round neither its input nor a weight that is not packed yet."""

    __torch_function__ = classmethod(_passed_through)


class _WatchedView(WeightView):
    """The same for a packed weight."""

    __torch_function__ = classmethod(_passed_through)  # type: ignore[assignment]


class QuantizedAttention(QuantizedWeight):
    """Mixin of ``nn.MultiheadAttention`` with quantized projections of queries, keys and values.

    They are dequantized in each forward pass, and everything else is torch's: the module takes less memory and no less
    time. The output projection is a layer of its own (:class:`QAttentionOutput`), whose weight is read here.
    """

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
        """As of ``nn.MultiheadAttention``, never by its fast path.

        Returns:
            The output, and the weights of the attention or None.
        """
        mod: Any = self
        kind, out = query.dtype, mod.out_proj
        # autocast converts what it is given
        wanted = None if autocasts(query) else kind
        key_padding_mask = F._canonical_mask(
            key_padding_mask, "key_padding_mask", F._none_or_dtype(attn_mask), "attn_mask", kind
        )
        attn_mask = F._canonical_mask(attn_mask, "attn_mask", None, "", kind, False)
        turned = mod.batch_first and query.dim() == 3
        if turned:
            # what is one tensor stays one: torch projects it once
            moved = {id(x): x.transpose(1, 0) for x in (query, key, value)}
            query, key, value = (moved[id(x)] for x in (query, key, value))
        weights = {name: _as(self.rounded(name), wanted) for name in self.slot_names}
        output, scores = F.multi_head_attention_forward(
            query, key, value, mod.embed_dim, mod.num_heads, weights.get(PACKED), _as(mod.in_proj_bias, wanted),
            _as(mod.bias_k, wanted), _as(mod.bias_v, wanted), mod.add_zero_attn, mod.dropout,
            _as(out.rounded() if isinstance(out, QuantizedWeight) else out.weight, wanted), _as(out.bias, wanted),
            training=self.training, key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
            use_separate_proj_weight=PACKED not in weights, average_attn_weights=average_attn_weights,
            is_causal=is_causal, **{name: weights.get(name) for name in SEPARATE},
        )  # fmt: skip
        return output.transpose(1, 0) if turned else output, scores

    def read_slot(self, name: str) -> torch.Tensor:
        """As of every module, off torch's fast paths (:class:`_Watched`): a parameter where nothing is differentiated,
        as only then they run."""
        weight: Any = super().read_slot(name)
        if isinstance(weight, WeightView):
            weight.__class__ = _WatchedView
        elif isinstance(weight, nn.Parameter) and not torch.is_grad_enabled() and not recording():
            alias: Any = weight.detach().as_subclass(_Watched).requires_grad_(weight.requires_grad)
            vars(alias).update(vars(weight), _is_param=True)
            weight = alias
        found: torch.Tensor = weight
        return found

    def extra_repr(self) -> str:
        """Sizes, the scheme and the state."""
        mod: Any = self
        texts = dict.fromkeys(str(self.scheme_of(slot)) for slot in self.slots)
        return (
            f"embed_dim={mod.embed_dim}, num_heads={mod.num_heads}, weights={', '.join(texts)}" + self._describe_state()
        )


def _as(tensor: Any, dtype: torch.dtype | None) -> Any:
    """A tensor or None, in another dtype unless that is None."""
    return tensor if tensor is None or dtype is None else tensor.to(dtype)


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


@register_qmodule(
    lambda module: _is_attention(module) and module._parameters.get(PACKED) is not None, by_default=[LOAD, QUANTIZE]
)
class QMultiheadAttention(QuantizedAttention):
    """Queries, keys and values have one size: one weight of shape (3 * embed_dim, embed_dim)."""

    declared: ClassVar[tuple[Slot, ...]] = (Slot(PACKED),)


@register_qmodule(
    lambda module: _is_attention(module) and module._parameters.get(PACKED) is None, by_default=[LOAD, QUANTIZE]
)
class QCrossAttention(QuantizedAttention):
    """Keys or values have a size of their own: a weight each."""

    declared: ClassVar[tuple[Slot, ...]] = tuple(Slot(name) for name in SEPARATE)


@register_qmodule(NonDynamicallyQuantizableLinear, by_default=[LOAD, QUANTIZE])
class QAttentionOutput(QLinear):
    """The output projection of ``nn.MultiheadAttention``, which is never called: the attention around it reads its
    weight, so that its input is not rounded."""

    @classmethod
    def from_module(
        cls, module: Any, scheme: Any, activations: Any = None, fit: Any = None, static: bool = False
    ) -> Any:
        """See :class:`QLinear`; without ``activations``."""
        return super().from_module(module, scheme, None, fit)
