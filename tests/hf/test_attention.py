"""Families with torch's own attention: its projections are packed while the model loads."""

import pytest
import torch
import transformers as tf
from tiny_models import SHAPE, lively, noise, relative, tokens
from torch import nn

from quanto_hf import QuantoConfig, plan, report
from quanto_hf.nn.qattention import QuantizedAttention

VISION = {key: value for key, value in SHAPE.items() if key != "max_position_embeddings"}


def siglip():
    return tf.SiglipVisionModel(tf.SiglipVisionConfig(**VISION, image_size=16, patch_size=8))


def bridgetower():
    text = {**VISION, "vocab_size": 96, "max_position_embeddings": 64, "type_vocab_size": 1}
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8}
    config = tf.BridgeTowerConfig(
        text_config=text, vision_config=vision, hidden_size=64, num_attention_heads=4, num_hidden_layers=1,
        share_cross_modal_transformer_layers=True, contrastive_hidden_size=32,
    )  # fmt: skip
    return tf.BridgeTowerModel(config)


def tower(model):
    return model(input_ids=tokens(1, 6), pixel_values=noise(1, 3, 16, 16)).pooler_output


FAMILIES = {
    "siglip": (siglip, lambda m: m(noise(1, 3, 16, 16)).pooler_output),
    "bridgetower": (bridgetower, tower),
}


def attentions(model):
    return [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_family_is_packed_planned_saved_reloaded_and_given_back(name, tmp_path):
    build, run = FAMILIES[name]
    plain = lively(build())
    plain.save_pretrained(tmp_path / "float")
    config = QuantoConfig("int8")
    model = type(plain).from_pretrained(tmp_path / "float", quantization_config=config).eval()
    assert attentions(model) and all(isinstance(module, QuantizedAttention) for module in attentions(model))
    assert not any("in_proj_weight" in module._parameters for module in attentions(model))
    rows = [row for row in report(model).rows if row.name.endswith(("in_proj_weight", "out_proj.weight"))]
    assert rows and all(row.stored == "int8" for row in rows)
    assert plan(tmp_path / "float", config, auto_class=type(plain)).nbytes == model.get_memory_footprint()
    made = run(model)
    assert relative(made, run(plain)) < 0.1
    model.save_pretrained(tmp_path / "saved")
    again = type(plain).from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(run(again), made)
    again.dequantize()
    assert all(type(module) is nn.MultiheadAttention for module in attentions(again))
    assert relative(run(again), made) < 1e-4
    for key, tensor in plain.state_dict().items():
        assert again.state_dict()[key].shape == tensor.shape
