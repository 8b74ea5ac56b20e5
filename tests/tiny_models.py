"""Tiny random models of many architectures, saved like real checkpoints, for tests that load them.

The weights are drawn so that every layer passes its input on with about unit variance: with the initial weights of
transformers a model of this size answers nearly the same to everything, and hides mistakes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import nn

from quanto_hf import QLinear

VOCABULARY = 96
TEXT = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
PICTURE = {"image_size": 16, "patch_size": 8, "num_channels": 3}


@dataclass(frozen=True)
class Tiny:
    """How one architecture is built and called; ``eligible`` counts the linear layers that are to be quantized."""

    cls: Any
    config: Callable[[], Any]
    inputs: Callable[[], dict[str, torch.Tensor]]
    eligible: int
    generates: bool = False


def tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    """Token ids without special ones."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def noise(*shape: int) -> torch.Tensor:
    """Normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def llama_config(**values: Any) -> Any:
    """Grouped-query attention, biases nowhere."""
    return tf.LlamaConfig(**{**TEXT, **SHAPE, "num_key_value_heads": 2, "tie_word_embeddings": False, **values})


def _text() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens()}


def _whisper() -> Any:
    return tf.WhisperConfig(
        **TEXT, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=16, max_source_positions=20, max_target_positions=32,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip


def _clip() -> Any:
    shape = {key: value for key, value in SHAPE.items() if key != "max_position_embeddings"}
    text = {**TEXT, **shape, "max_position_embeddings": 16, "projection_dim": 64}
    return tf.CLIPConfig(text_config=text, vision_config={**shape, **PICTURE, "projection_dim": 64}, projection_dim=64)


TINY: dict[str, Tiny] = {
    "llama": Tiny(tf.LlamaForCausalLM, llama_config, _text, 14, True),
    "llama-tied": Tiny(tf.LlamaForCausalLM, lambda: llama_config(tie_word_embeddings=True), _text, 14, True),
    "gpt-neox": Tiny(tf.GPTNeoXForCausalLM, lambda: tf.GPTNeoXConfig(**TEXT, **SHAPE), _text, 8, True),
    "opt": Tiny(
        tf.OPTForCausalLM,
        lambda: tf.OPTConfig(**TEXT, **{**SHAPE, "word_embed_proj_dim": 64, "ffn_dim": 128}),
        _text, 12, True,
    ),
    "bert": Tiny(tf.BertModel, lambda: tf.BertConfig(**TEXT, **SHAPE), _text, 13),
    "t5": Tiny(
        tf.T5ForConditionalGeneration,
        lambda: tf.T5Config(
            vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0
        ),
        lambda: {"input_ids": tokens(), "decoder_input_ids": tokens(2, 6)},
        32, True,
    ),
    "vit": Tiny(
        tf.ViTForImageClassification,
        lambda: tf.ViTConfig(**SHAPE, **PICTURE, num_labels=5),
        lambda: {"pixel_values": noise(2, 3, 16, 16)}, 12,
    ),
    "whisper": Tiny(
        tf.WhisperForConditionalGeneration, _whisper,
        lambda: {"input_features": noise(2, 16, 40), "decoder_input_ids": tokens(2, 6)}, 32,
    ),
    "clip": Tiny(
        tf.CLIPModel, _clip,
        lambda: {"input_ids": tokens(2, 10), "pixel_values": noise(2, 3, 16, 16)}, 26,
    ),
}  # fmt: skip


def build(name: str) -> Any:
    """A float32 model with weights that let outputs vary."""
    tiny = TINY[name]
    return lively(tiny.cls(tiny.config()))


@torch.no_grad()
def lively(model: nn.Module) -> Any:
    """Draw all parameters of a model anew, so that signals keep their size from layer to layer."""
    draw = torch.Generator().manual_seed(3)
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            norm = parameter_name.endswith("weight")
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw) + float(norm))
        else:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=draw)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            # more than unit variance, so that tokens stay apart in the sums of residual streams
            module.weight.normal_(0, 1.0, generator=draw)
    return model.eval()


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Path:
    """A float checkpoint of a tiny model."""
    build(name).to(dtype).save_pretrained(folder, **kwargs)
    return folder


@torch.no_grad()
def output(model: Any, name: str) -> torch.Tensor:
    """The main result of a model for the inputs of its architecture."""
    inputs = {
        key: value.to(model.dtype) if value.is_floating_point() else value for key, value in TINY[name].inputs().items()
    }
    result = model(**inputs)
    for field in ("logits", "logits_per_text", "last_hidden_state"):
        if getattr(result, field, None) is not None:
            return getattr(result, field)
    raise AssertionError(f"{type(result).__name__} has no known result")


def qlinears(model: nn.Module) -> dict[str, QLinear]:
    """The quantized layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QLinear)}


def relative(made: torch.Tensor, wanted: torch.Tensor) -> float:
    """||made - wanted|| / ||wanted||."""
    return float((made.double() - wanted.double()).norm() / wanted.double().norm())
