"""Bytes of the keys and values that a model caches while it generates, from its config."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class KVCache:
    """What generation caches.

    Args:
        layers: bytes of each layer of the decoder.
        context: tokens per sequence.
        batch: sequences.
        assumed: what these numbers suppose, in a sentence.
    """

    layers: tuple[int, ...]
    context: int
    batch: int
    assumed: str

    @property
    def nbytes(self) -> int:
        """Of all layers."""
        return sum(self.layers)


def kv_cache(model: Any, dtype: torch.dtype, context: int, batch: int = 1) -> KVCache:
    """The cache that ``generate`` makes by default, when it holds ``context`` tokens.

    Args:
        model: any model, also on meta; only one of transformers that generates has a cache.
        dtype: of the model.
    """
    if not context or not batch:
        return KVCache((), context, batch, "no context")
    if not hasattr(model, "can_generate") or not model.can_generate():
        return KVCache((), context, batch, f"{type(model).__name__} does not generate: nothing is cached")
    from transformers import DynamicCache

    config = model.config.get_text_config(decoder=True)
    if not hasattr(config, "num_hidden_layers"):
        return KVCache((), context, batch, f"{type(model).__name__} has no layers with a cache: nothing is cached")
    # transformers knows which layers have a window, share the cache of others, or keep a state instead
    layers = DynamicCache(config=model.config).layers
    each = getattr(config, "per_layer_config", None) or [config] * len(layers)
    notes: set[str] = set()
    compressed = any(hasattr(module, "expand_kv") for module in model.modules())
    found = []
    for layer, its in zip(layers, each, strict=False):
        kind = type(layer).__name__
        if "Dynamic" not in kind and "Attention" not in kind:
            # another layer's cache is used
            found.append(0)
            continue
        if kind.startswith("LinearAttention"):
            notes.add("the fixed states of linear attention are not counted")
        if kind == "LinearAttentionLayer":
            found.append(0)
            continue
        window = getattr(layer, "sliding_window", None)
        if window:
            notes.add(f"windows of {window} tokens")
        values, said = _per_token(its, compressed)
        notes.add(said)
        # the token that comes next is the last one of the window
        tokens = min(context, window - 1) if window else context
        if model.config.is_encoder_decoder:
            # the keys and values of the encoder's output are kept as well
            encoded = getattr(model.config, "max_source_positions", None) or context
            notes.add(f"{encoded} encoder positions")
            tokens += encoded
        found.append(batch * tokens * values * dtype.itemsize)
    name = str(dtype).removeprefix("torch.")
    cached = len([nbytes for nbytes in found if nbytes])
    assumed = ", ".join([f"{cached} of {len(found)} layers" if cached < len(found) else f"{cached} layers", name])
    return KVCache(tuple(found), context, batch, ", ".join([assumed, *sorted(notes)]))


def _per_token(config: Any, compressed: bool) -> tuple[int, str]:
    """Numbers that one layer keeps per token, and how they come about."""
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        return 0, "no attention, whose states are not counted"
    if latent := getattr(config, "kv_lora_rank", None):
        rope = config.qk_rope_head_dim
        if compressed:
            return latent + rope, f"latents of {latent} + {rope} values (MLA)"
        width = config.qk_nope_head_dim + rope + config.v_head_dim
        return heads * width, f"{heads} heads, keys and values of {width} together (MLA, cached expanded)"
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        kv = 1
    return 2 * kv * head, f"{kv} key-value heads of {head}"
