"""Sizes of twelve published models, planned from their configs, beside the best other file of about 4 bits.

    python benchmarks/published_sizes.py [--out docs/models.md]

No weight is made or read. Of the models' config.json the values stand here on which sizes depend. The table is printed;
``--out`` also puts it into the section of that page which has this command. The exit status is 1 if a model takes more
than 1.02 x of the other file.

The sizes of the others are those of public listings: of the file, in units of 1e9 bytes. Where none is known it is
parameters x bits per weight of the same format for models of its kind, and marked as an estimate.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import transformers as tf

import quanto_hf

VISION = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "image_size": 896, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
Q4 = "GGUF Q4_K_M"


class Published(NamedTuple):
    """A model: its config, its class, its parameters in units of 1e9, and the best other file: GB and what it is."""

    config: object
    auto_class: object
    parameters: float
    other: float
    what: str


def _llama(**values: object) -> object:
    return tf.LlamaConfig(rms_norm_eps=1e-5, **values)


CAUSAL = tf.AutoModelForCausalLM
MODELS = {
    "Llama-3.1-8B": lambda: Published(
        _llama(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
               num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False), CAUSAL, 8.030, 4.92, Q4),
    "Llama-3.2-1B": lambda: Published(
        _llama(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
               num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
        CAUSAL, 1.236, 0.81, Q4),
    "Qwen3-0.6B": lambda: Published(
        tf.Qwen3Config(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                       num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True),
        CAUSAL, 0.596, 0.40, Q4),
    "Qwen3-30B-A3B": lambda: Published(
        tf.Qwen3MoeConfig(vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
                          num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
                          num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, tie_word_embeddings=False),
        CAUSAL, 30.532, 18.6, Q4),
    "Mixtral-8x7B": lambda: Published(
        tf.MixtralConfig(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                         num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
                         tie_word_embeddings=False), CAUSAL, 46.703, 26.44, Q4),
    "gpt-oss-20b": lambda: Published(
        tf.GptOssConfig(vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=24,
                        num_attention_heads=64, num_key_value_heads=8, head_dim=64, num_local_experts=32,
                        num_experts_per_tok=4, tie_word_embeddings=False),
        CAUSAL, 20.915, 12.1, "GGUF MXFP4 (the published safetensors: 13.8)"),
    "DeepSeek-V3": lambda: Published(
        tf.DeepseekV3Config(vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
                            num_hidden_layers=61, num_attention_heads=128, num_key_value_heads=128, n_shared_experts=1,
                            n_routed_experts=256, kv_lora_rank=512, q_lora_rank=1536, qk_rope_head_dim=64,
                            v_head_dim=128, qk_nope_head_dim=128, first_k_dense_replace=3, tie_word_embeddings=False),
        CAUSAL, 671.026, 404.0, Q4),
    "Gemma-3-4b-it": lambda: Published(
        tf.Gemma3Config(
            text_config={"vocab_size": 262208, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
                         "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
            vision_config=VISION, mm_tokens_per_image=256),
        tf.AutoModelForImageTextToText, 4.300, 3.34, f"{Q4} 2.49 + mmproj f16 0.85"),
    "Phi-3-mini-4k": lambda: Published(
        tf.Phi3Config(vocab_size=32064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
                      num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False),
        CAUSAL, 3.821, 2.39, Q4),
    "Whisper-large-v3": lambda: Published(
        tf.WhisperConfig(vocab_size=51866, d_model=1280, encoder_layers=32, decoder_layers=32,
                         encoder_attention_heads=20, decoder_attention_heads=20, encoder_ffn_dim=5120,
                         decoder_ffn_dim=5120, num_mel_bins=128),
        tf.AutoModelForSpeechSeq2Seq, 1.543, 1.08, "whisper.cpp q5_0"),
    "GPT-2-XL": lambda: Published(
        tf.GPT2Config(n_embd=1600, n_layer=48, n_head=25), CAUSAL, 1.558, 0.98, f"{Q4} (estimate, 4.8 to 5 bits)"),
    "Mamba-2.8b": lambda: Published(
        tf.MambaConfig(vocab_size=50280, hidden_size=2560, num_hidden_layers=64, time_step_rank=160),
        CAUSAL, 2.768, 1.67, f"{Q4} (estimate, 4.83 bits)"),
}  # fmt: skip
MOST = 1.02


def table() -> tuple[list[str], list[str]]:
    """The lines of the table, and the names of those that are too large."""
    lines, large = (
        ["| model | parameters | bfloat16 | int4, embeddings int8 | best other | ratio |", "|---|---|---|---|---|---|"],
        [],
    )
    for name, make in MODELS.items():
        model = make()
        config = quanto_hf.QuantoConfig("int4", embeddings="int8")
        plan = quanto_hf.plan(
            model.config, config, auto_class=model.auto_class, device_map="cpu", context=0, dtype=torch.bfloat16
        )
        count = sum(torch.Size(row.shape).numel() for row in plan.report.rows) / 1e9
        assert abs(count / model.parameters - 1) < 0.002, f"{name}: {count:.3f} B parameters, not {model.parameters}"
        size = plan.nbytes / 1e9
        large += [name] if size > MOST * model.other else []
        lines.append(
            f"| {name} | {count:.2f} B | {2 * count:.2f} GB | {size:.2f} GB | {model.other:g} GB, {model.what} "
            f"| {size / model.other:.2f} |"
        )
    return lines, large


def main() -> None:
    """Print the table, or put it into a page."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--out", type=Path)
    given = ask.parse_args()
    lines, large = table()
    print("\n".join(lines))
    if given.out:
        before = re.compile(r"(?<=published_sizes\.py`\n\n)\|.*?\n(?!\|)", re.S)
        text, count = before.subn("\n".join(lines) + "\n", given.out.read_text(encoding="utf-8"))
        assert count == 1, f"{given.out} has no section with this command"
        given.out.write_text(text, encoding="utf-8")
    if large:
        sys.exit(f"above {MOST} x the other: {', '.join(large)}")


if __name__ == "__main__":
    main()
