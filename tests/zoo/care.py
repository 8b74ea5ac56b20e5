"""Families that need something of their own, and why. Everything else is found out (:mod:`.shrink`, :mod:`.inputs`)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .shrink import Step


@dataclass(frozen=True)
class Care:
    """What one family needs.

    Args:
        cls: name of the model class, where another one than usual runs alone.
        config: arguments of the published config, where the class has none that can be built.
        tiny: values of the tiny config; a dict changes a part of it.
        inputs: arguments of the forward pass, by the tiny config.
        steps: sizes to try; empty is all.
        calm: whether the initial weights stay, where others give endless outputs.
        left: why the family is left out; empty if it is not.
        why: the reason for the rest.
    """

    cls: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    tiny: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[Any], dict[str, Any]] | None = None
    steps: tuple[Step, ...] = ()
    calm: bool = False
    left: str = ""
    why: str = ""


def _series(config: Any) -> dict[str, Any]:
    """A time series: the past with its features and marks, the future with its features."""
    draw = torch.Generator().manual_seed(1)
    past = config.context_length + max(config.lags_sequence)
    features = max(config.num_time_features, 1)
    return {
        "past_values": torch.randn(2, past, generator=draw),
        "past_time_features": torch.randn(2, past, features, generator=draw),
        "past_observed_mask": torch.ones(2, past),
        "future_values": torch.randn(2, config.prediction_length, generator=draw),
        "future_time_features": torch.randn(2, config.prediction_length, features, generator=draw),
        "static_categorical_features": torch.zeros(2, 1, dtype=torch.int64),
    }


SERIES = Care(
    config={"prediction_length": 8, "context_length": 16, "num_time_features": 2, "num_static_categorical_features": 1,
            "cardinality": [4], "embedding_dimension": [8]},
    inputs=_series,
    why="the length of a series has no default",
)  # fmt: skip
IMAGES = {"<image>": 100, "IMGIMGA": 101}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
PACKAGES = {"dinat": "natten", "layoutlmv2": "detectron2", "timm_backbone": "timm", "timm_wrapper": "timm",
            "perception_lm": "timm", "fast_vlm": "timm", "edgetam": "timm", "pe_video": "timm"}  # fmt: skip


def _sound(config: Any) -> dict[str, Any]:
    """Text and a spectrogram."""
    audio, draw = config.audio_config, torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(200, 300, (1, 16), generator=draw),
        "input_features": torch.randn(1, 1, 1024, audio.num_mel_bins, generator=draw),
        "is_longer": torch.zeros(1, 1, dtype=torch.bool),
    }


def _speech(config: Any) -> dict[str, Any]:
    """Text and the spectrogram of a voice."""
    draw = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(200, 250, (1, 16), generator=draw),
        "input_features": torch.randn(1, config.decoder_config.feature_size, 96, generator=draw),
    }


def _codebooks(config: Any) -> dict[str, Any]:
    """Text, and ids of each codebook."""
    draw, books = torch.Generator().manual_seed(1), config.decoder.num_codebooks
    return {
        "input_ids": torch.randint(200, 300, (2, 16), generator=draw),
        "decoder_input_ids": torch.randint(3, 60, (2 * books, 8), generator=draw),
    }


def _two_pictures(config: Any) -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, 2, 3, 64, 64, generator=torch.Generator().manual_seed(1))}


def _page(config: Any) -> dict[str, Any]:
    """Text with its boxes."""
    ids = torch.randint(200, 300, (1, 16), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "decoder_input_ids": ids, "bbox": torch.tensor([0.1, 0.1, 0.2, 0.2]).expand(1, 16, 4)}


def _patches(config: Any) -> dict[str, Any]:
    """Text, and a picture cut into patches."""
    draw, side = torch.Generator().manual_seed(1), config.vision_config.patch_size
    return {
        "input_ids": torch.randint(200, 300, (1, 16), generator=draw),
        "pixel_values": torch.randn(1, 16, 3 * side**2, generator=draw),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.int64),
        "spatial_shapes": torch.tensor([[4, 4]]),
    }


CARE: dict[str, Care] = {
    **{name: Care(left=f"needs the package {package}") for name, package in PACKAGES.items()},
    **{name: Care(config={"use_timm_backbone": False}, why="the default backbone needs the package timm")
       for name in ("detr", "conditional_detr", "table_transformer", "dab_detr", "omdet_turbo")},
    "dpt": Care(steps=(Step(16, 99), Step(8, 99)), why="outputs of its 12 layers are named one by one"),
    "autoformer": SERIES,
    "informer": SERIES,
    "time_series_transformer": SERIES,
    "step3p7": Care(config={"text_config": {"sliding_window": 64, "share_expert_dim": 1280}}, why="no default"),
    "zamba": Care(tiny={"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
                  why="two layers that share their weights, at least"),
    "musicgen": Care(inputs=_codebooks, why="the decoder takes a row per codebook"),
    "musicgen_melody": Care(inputs=_codebooks, why="the decoder takes a row per codebook"),
    "vivit": Care(tiny={"num_frames": 4, "image_size": 64}, why="3136 tokens"),
    "dbrx": Care(config={"attn_config": {"rope_theta": 5e5, "kv_n_heads": 8, "clip_qkv": 8}}, why="no default"),
    "reformer": Care(cls="ReformerModelWithLMHead", config={"is_decoder": True}, why="the default cannot be masked"),
    "inkling": Care(cls="InklingForCausalLM", why="the model with sound cannot be saved (transformers 5.23)"),
    "deepseek_v2": Care(config={"num_experts_per_tok": 2}, why="no default"),
    "aya_vision": Care(config={"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}},
                       why="the default tower has a width that its heads do not divide"),
    "bamba": Care(tiny={"attn_layer_indices": [1]}, why="no layer of the default has attention"),
    "bark": Care(cls="BarkSemanticModel", why="the whole has no forward pass: generate calls its parts"),
    "deformable_detr": Care(config={"use_timm_backbone": False}, steps=(Step(4),),
                            why="the default backbone needs the package timm; norms of 32 groups"),
    "cohere_compass": Care(config={"text_config": {"rope_parameters": {"full_attention": ROPE}}}, why="no default"),
    "efficientnet": Care(tiny={"image_size": 64}, why="pictures of 600 pixels"),
    "align": Care(tiny={"vision_config": {"image_size": 64}}, why="pictures of 600 pixels"),
    "esm": Care(config={"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32}, why="no default"),
    "dots1": Care(config={"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2}, why="no default"),
    "ernie4_5_vl_moe": Care(steps=(Step(4, heads=True),), why="sections of a head that add up to its width"),
    **{name: Care(config={"text_config": {"rope_parameters": {**ROPE, "mrope_section": [8, 12, 12],
                                                              "partial_rotary_factor": 0.5}}},
                  steps=(Step(8, heads=True), Step(4, heads=True)), why="the default rotates parts that do not add up")
       for name in ("glm4v", "glm46v", "glm_image", "glm_ocr")},
    **{name: Care(tiny={"vision_config": {"image_size": 112}}, why="pictures of 1540 pixels")
       for name in ("mistral3", "mistral_large4", "lighton_ocr")},
    "pixtral": Care(tiny={"image_size": 112}, why="pictures of 1024 pixels"),
    "nemotron": Care(config={"num_key_value_heads": 8}, why="no default"),
    "qwen2_5_omni": Care(cls="Qwen2_5OmniThinkerForConditionalGeneration", steps=(Step(4, heads=True),),
                          why="the whole wants a file of voices"),
    "qwen3_omni_moe": Care(cls="Qwen3OmniMoeThinkerForConditionalGeneration", why="the default talker cannot be built"),
    "qwen4_exp": Care(
        config={"text_config": {"indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 256,
                                "indexer_budget": 2048, "indexer_compress_ratio": 4}}, why="no default"),
    "siglip2": Care(inputs=_patches, why="pictures are cut before"),
    "glm4v_moe": Care(
        config={"text_config": {"head_dim": 128, "rope_parameters": {**ROPE, "mrope_section": [8, 12, 12],
                                                                     "partial_rotary_factor": 0.5}}},
        steps=(Step(8, heads=True),), why="the default rotates parts that do not add up"),
    "moonshine_streaming": Care(config={"num_key_value_heads": 8}, why="no default"),
    "granite4_vision": Care(config={"deepstack_layer_map": [[-2, 0]], "downsample_rate": "4/8",
                                    "spatial_target_layers": [1]}, steps=(Step(8), Step(4)), why="no default"),
    "vibevoice_acoustic_tokenizer": Care(tiny={"num_filters": 4}, why="widths that double six times"),
    "vibevoice": Care(tiny={"audio_config": {"num_filters": 4}, "semantic_model_config": {"num_filters": 4}},
                      why="widths that double six times"),
    "vibevoice_asr": Care(tiny={"acoustic_tokenizer_encoder_config": {"num_filters": 4},
                                "semantic_tokenizer_encoder_config": {"num_filters": 4}},
                          why="widths that double six times"),
    "molmo2": Care(tiny={"adapter_config": {"vision_feature_layer": [1, 0]}}, why="it takes two layers of the tower"),
    "diffusion_gemma": Care(
        config={"text_config": {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}},
        why="no default"),
    "emu3": Care(config={"vocabulary_map": IMAGES}, tiny={"vocabulary_map": IMAGES, "vq_config": {"base_channels": 32}},
                 why="no default; norms of 32 groups"),
    **{name: Care(inputs=_two_pictures, why="two pictures to compare") for name in ("lightglue", "superglue")},
    "kimi_k25": Care(steps=(Step(8, heads=True),), why="heads of an even width"),
    **{name: Care(config={"vocab_size": 32}, why="no default") for name in ("wav2vec2_bert", "wav2vec2_conformer")},
    "vits": Care(calm=True, why="other weights make it speak for minutes"),
    "xmod": Care(config={"default_language": "en_XX"}, why="no default"),
    "udop": Care(inputs=_page, why="boxes in parts of the page"),
    "deepseek_ocr2": Care(
        config={"text_config": {"num_experts_per_tok": 6, "num_hidden_layers": 12, "n_group": 1, "topk_group": 1,
                                "mlp_layer_types": ["dense", *["sparse"] * 11]}}, why="no default"),
    **{name: Care(config={"head_dim": 128}, why="no default")
       for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "hunyuan_vl": Care(config={"text_config": {"head_dim": 128}}, why="no default"),
    "lfm2_moe": Care(config={"layer_types": ["conv", "conv", "full_attention", "conv"] * 8}, why="no default"),
    "granitemoehybrid": Care(config={"layer_types": [*["mamba"] * 7, "attention"] * 4},
                             why="no layer of the default has attention"),
    "bros": Care(steps=(Step(1),), why="the widths of its boxes follow from the others"),
    "beit": Care(cls="BeitForImageClassification", why="for segmentation it needs other outputs than the default's"),
    "blt": Care(tiny={"encoder_hash_byte_group_vocab": 512}, why="no other name of a vocabulary ends so"),
    "clap": Care(inputs=_sound, steps=(Step(1),), why="two inputs of unlike shapes"),
    "clvp": Care(inputs=_speech, steps=(Step(16),), why="two inputs of unlike shapes"),
    "gemma3n": Care(cls="Gemma3nForCausalLM", tiny={"num_kv_shared_layers": 0},
                    why="its vision tower needs the package timm"),
    "chameleon": Care(config={"vocabulary_map": IMAGES}, tiny={"vocabulary_map": IMAGES}, why="no default"),
}  # fmt: skip
