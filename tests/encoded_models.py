"""Tiny checkpoints in the formats of other methods, with the names and layouts of published ones."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tiny_models import lively

from quanto_hf.io.decoders.mxfp4 import E2M1

GPT_OSS = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16,
    "max_position_embeddings": 128, "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
DEEPSEEK = {
    "hidden_size": 160, "intermediate_size": 192, "moe_intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 48, "kv_lora_rank": 40, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "max_position_embeddings": 128, "n_shared_experts": 1,
}  # fmt: skip


def gpt_oss(folder: Path, **changes: Any) -> Path:
    """A gpt-oss whose experts are in MXFP4."""
    model = lively(tf.GptOssForCausalLM(tf.GptOssConfig(**{**GPT_OSS, **changes}))).to(torch.bfloat16)
    model.save_pretrained(folder)
    return encode(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}, _to_mxfp4)


def deepseek(folder: Path, **changes: Any) -> Path:
    """A DeepSeek-V3 with linear layers and experts in FP8 blocks of 128 x 128, none of which fits a whole number of
    times."""
    config = tf.DeepseekV3Config(**{**DEEPSEEK, **changes})
    lively(tf.DeepseekV3ForCausalLM(config)).to(torch.bfloat16).save_pretrained(folder)
    method = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return encode(folder, method, _to_fp8)


def encode(folder: Path, method: dict[str, Any], one: Any) -> Path:
    """Encode the tensors of a saved model, in place.

    Args:
        method: its quantization config.
        one: name and tensor -> the tensors in their place.
    """
    for file in folder.glob("*.safetensors"):
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(file).items():
            tensors.update(one(name, tensor))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
    return folder


def _to_mxfp4(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: tensor}
    groups = tensor.float().transpose(1, 2).unflatten(-1, (-1, 32))
    powers = (groups.abs().amax(-1) / 6).log2().ceil().clamp(-127, 127)
    numbers = torch.tensor(E2M1, dtype=torch.float32)
    codes = (groups / powers.exp2().unsqueeze(-1)).unsqueeze(-1).sub(numbers).abs().argmin(-1).to(torch.uint8)
    blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return {f"{name}_blocks": blocks, f"{name}_scales": (powers + 127).to(torch.uint8)}


def _to_fp8(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if not name.endswith("proj.weight") and "_proj_with_mqa" not in name and "_b_proj" not in name:
        return {name: tensor}
    rows, columns = tensor.shape
    down, across = -(-rows // 128), -(-columns // 128)
    padded = torch.zeros(down * 128, across * 128)
    padded[:rows, :columns] = tensor.float()
    blocks = padded.view(down, 128, across, 128)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).reshape(down * 128, -1)[:rows, :columns].to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scale}
