"""A Llama model written to a GGUF file, as llama.cpp does it, for tests that read one."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

# numbers of ggml: types of tensors, and of values in the header
F32, F16, Q8_0 = 0, 1, 8
STRING, ARRAY = 8, 9
LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(model: Any, file: Path, kind: int = Q8_0, tokenizer: Path | None = None) -> None:
    """Write a LlamaForCausalLM.

    Args:
        model: float.
        file: the new file.
        kind: of the matrices; vectors are float32.
        tokenizer: a folder with a tokenizer.json of byte-level BPE.
    """
    config, header, table, data = model.config, [], [], b""
    for key, value in _values(config).items():
        header.append(_text(key if key.startswith("general.") else f"llama.{key}") + _value(value))
    for key, value in ({} if tokenizer is None else _tokenizer(tokenizer)).items():
        header.append(_text(f"tokenizer.ggml.{key}") + _value(value))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = _permuted(name, tensor.float(), config).numpy()
        stored = F32 if values.ndim == 1 else kind
        shape = values.shape[::-1]
        table.append(
            _text(_name(name)) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, stored, len(data))
        )  # fmt: skip
        data += _pad(_blocks(values, stored))
    head = b"GGUF" + struct.pack("<IQQ", 3, len(table), len(header)) + b"".join(header) + b"".join(table)
    file.write_bytes(_pad(head) + data)


def _values(config: Any) -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": config.vocab_size,
    }


def _tokenizer(folder: Path) -> dict[str, Any]:
    made = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in made["merges"]]
    tokens = sorted(made["vocab"], key=made["vocab"].get)
    kinds = [3 if token in ("<s>", "</s>") else 1 for token in tokens]
    return {
        "model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": kinds, "merges": merges,
        "bos_token_id": 0, "eos_token_id": 1, "add_bos_token": True,
    }  # fmt: skip


def _name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if module in OUTER:
        return f"{OUTER[module]}.{leaf}"
    number, _, inner = module.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{LAYER[inner]}.{leaf}"


def _permuted(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Rows of queries and keys in the order of llama.cpp, where the two halves of a rotation lie side by side."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _blocks(values: np.ndarray, kind: int) -> bytes:
    if kind != Q8_0:
        return values.astype(np.float32 if kind == F32 else np.float16).tobytes()
    groups = values.reshape(-1, 32)
    scale = (np.abs(groups).max(1, keepdims=True) / 127).astype(np.float16)
    codes = np.round(groups / np.maximum(scale.astype(np.float32), 1e-12)).astype(np.int8)
    return np.concatenate([scale.view(np.uint8), codes.view(np.uint8)], axis=1).tobytes()


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    kind = {bool: 7, int: 4, float: 6, str: STRING, list: ARRAY}[type(value)]
    return struct.pack("<I", kind) + _content(value, kind)


def _content(value: Any, kind: int) -> bytes:
    if kind == STRING:
        return _text(value)
    if kind == ARRAY:
        inner = STRING if isinstance(value[0], str) else 5
        return struct.pack("<IQ", inner, len(value)) + b"".join(_content(item, inner) for item in value)
    return struct.pack({7: "<?", 4: "<I", 5: "<i", 6: "<f"}[kind], value)


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 32)
