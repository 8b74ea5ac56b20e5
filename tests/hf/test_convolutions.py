"""Convolutions of real families: packed while they load where one line asks for it, planned, saved and reloaded."""

import pytest
import torch
import transformers as tf
from tiny_models import lively, noise, relative, tokens

from quanto_hf import QuantoConfig, plan, report


def resnet():
    config = tf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64, 64], depths=[1] * 4)
    return tf.ResNetForImageClassification(config)


def whisper():
    config = tf.WhisperConfig(
        vocab_size=96, pad_token_id=0, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=16, max_source_positions=20,
        max_target_positions=32, decoder_start_token_id=1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return tf.WhisperModel(config)


def dac():
    config = tf.DacConfig(
        encoder_hidden_size=16, downsampling_ratios=[2, 4], decoder_hidden_size=64, upsampling_ratios=[4, 2],
        n_codebooks=2, codebook_size=32, codebook_dim=4, hidden_size=64,
    )  # fmt: skip
    return tf.DacModel(config)


def vivit():
    config = tf.VivitConfig(
        image_size=16, num_frames=4, tubelet_size=[2, 8, 8], hidden_size=64, num_hidden_layers=1,
        num_attention_heads=4, intermediate_size=64,
    )  # fmt: skip
    return tf.VivitModel(config)


def dpt():
    config = tf.DPTConfig(
        image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16, 24, 32, 32], fusion_hidden_size=16,
        reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    return tf.DPTForDepthEstimation(config)


def speech(model):
    return model(noise(1, 16, 40), decoder_input_ids=tokens(1, 5)).last_hidden_state


def asks(*patterns):
    return {pattern: {"weights": "int8"} for pattern in patterns}


# how to build one, how to run it, the kinds of convolutions, and what asks for them
FAMILIES = {
    "resnet": (resnet, lambda m: m(noise(1, 3, 32, 32)).logits, {"Conv2d"}, asks("*conv*")),
    "whisper": (whisper, speech, {"Conv1d"}, asks("*conv*")),
    "dac": (dac, lambda m: m.decoder(noise(1, 64, 8)), {"Conv1d", "ConvTranspose1d"}, asks("*conv*", "*_proj")),
    "vivit": (vivit, lambda m: m(noise(1, 4, 3, 16, 16)).last_hidden_state, {"Conv3d"}, asks("*.projection")),
    # a list that is called convs has no name of its own for its entries
    "dpt": (dpt, lambda m: m(noise(1, 3, 32, 32)).predicted_depth, {"Conv2d", "ConvTranspose2d"},
            asks("*convolution*", "convs.*", "*.resize", "*.projection")),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_family_is_packed_planned_saved_reloaded_and_given_back(name, tmp_path):
    build, run, kinds, overrides = FAMILIES[name]
    plain = lively(build())
    plain.save_pretrained(tmp_path / "float")
    config = QuantoConfig("int8", overrides=overrides)
    model = type(plain).from_pretrained(tmp_path / "float", quantization_config=config).eval()
    rows = report(model).rows
    assert {row.kind for row in rows if row.stored == "int8"} - {"Linear"} == kinds
    left = [row for row in rows if row.kind in kinds and row.reason and len(row.shape) > 2]
    # heads stay float by default, and the last layer of a neck
    assert all("head" in row.name or "heads stay float" in row.reason for row in left)
    assert plan(tmp_path / "float", config, auto_class=type(plain)).nbytes == model.get_memory_footprint()
    made = run(model)
    assert relative(made, run(plain)) < 0.1
    model.save_pretrained(tmp_path / "saved")
    again = type(plain).from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(run(again), made)
    again.dequantize()
    assert relative(run(again), made) < 1e-4
