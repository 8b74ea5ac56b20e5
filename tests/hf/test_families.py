"""Families of transformers that need something of their own: each is loaded, run, saved and reloaded."""

import pytest
import torch
from tiny_models import TEXT, lively, noise, qlinears, relative, tokens
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)
from transformers.models.falcon.modeling_falcon import FalconLinear

from quanto_hf import AqlmConfig, QuantoConfig


def mask2former():
    backbone = SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[1] * 4, num_heads=[1, 2, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, hidden_dim=32, mask_feature_size=32, feature_size=32, dim_feedforward=64,
        encoder_feedforward_dim=64, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=5,
    )  # fmt: skip
    return Mask2FormerForUniversalSegmentation(config)


def falcon_of_180b():
    config = FalconConfig(
        **TEXT, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2, bias=True,
        new_decoder_architecture=True,
    )  # fmt: skip
    return FalconForCausalLM(config)


def falcon():
    return FalconForCausalLM(FalconConfig(**TEXT, hidden_size=64, num_hidden_layers=2, num_attention_heads=4))


FAMILIES = {
    # keeps its layers in a list besides
    "mask2former": (mask2former, lambda m: m(pixel_values=noise(1, 3, 64, 64)).masks_queries_logits),
    # whose linear layers are of a class of its own
    "falcon": (falcon, lambda m: m(tokens()).logits),
    "falcon-180b": (falcon_of_180b, lambda m: m(tokens()).logits),
}


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_family_is_quantized_runs_saves_and_reloads(name, weights, tmp_path):
    build, run = FAMILIES[name]
    plain = lively(build())
    plain.save_pretrained(tmp_path / "float")
    config = QuantoConfig(weights)
    model = type(plain).from_pretrained(tmp_path / "float", quantization_config=config).eval()
    made = run(model)
    assert relative(made, run(plain)) < {"int8": 0.1, "int4": 0.7}[weights]
    config = QuantoConfig(weights, dequantize=True)
    assert (
        relative(run(type(plain).from_pretrained(tmp_path / "float", quantization_config=config).eval()), made) < 1e-4
    )
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(run(type(plain).from_pretrained(tmp_path / "saved").eval()), made)


def test_all_linear_layers_of_falcon_are_packed_and_plain_ones_come_back(tmp_path):
    lively(falcon()).save_pretrained(tmp_path)
    model = FalconForCausalLM.from_pretrained(tmp_path, quantization_config=QuantoConfig("int4"))
    assert len(qlinears(model)) == 8 and all(isinstance(m, FalconLinear) for m in qlinears(model).values())
    model.dequantize()
    assert type(model.transformer.h[0].mlp.dense_h_to_4h) is FalconLinear


@pytest.mark.filterwarnings("ignore:the codebooks")
def test_falcon_can_have_aqlm_weights(tmp_path):
    lively(falcon()).save_pretrained(tmp_path)
    config = AqlmConfig(num_codebooks=1, nbits_per_codebook=8)
    model = FalconForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    layer = model.transformer.h[0].mlp.dense_h_to_4h
    assert len(qlinears(model)) == 8 and "transformer.h.0.mlp.dense_h_to_4h.codes" in model.state_dict()
    assert isinstance(layer, FalconLinear)
