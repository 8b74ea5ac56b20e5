"""Other libraries convert the dtype of models in ways of their own: packed weights stay the numbers that they are."""

import peft
import pytest
import torch
import transformers as tf
from torch import nn

import quanto_hf
from quanto_hf import QuantoConfig, freeze, quantize

TYPES = ("int8", "int4", "int2", "float8", "nf4", "fp4")


def stored(model):
    return {name: tensor for name, tensor in model.state_dict().items() if ".weight_" in name}


def same_numbers(model, before):
    return all(torch.equal(tensor.double(), before[name].double()) for name, tensor in stored(model).items())


def load(weights):
    return tf.AutoModelForCausalLM.from_pretrained(
        quanto_hf.tiny_lm(), dtype=torch.bfloat16, quantization_config=QuantoConfig(weights)
    )


@torch.no_grad()
def logits(model):
    return model(torch.arange(3, 13)[None]).logits


@pytest.mark.parametrize("weights", TYPES)
def test_layers_that_are_converted_to_8_bits_between_their_uses_keep_scales_and_results(weights):
    """What diffusers' layerwise casting does to every layer of a known type."""
    model = freeze(quantize(nn.Sequential(nn.Linear(64, 48, bias=False), nn.Conv2d(3, 4, 3, bias=False)), weights))
    before, x, image = {n: t.clone() for n, t in stored(model).items()}, torch.randn(3, 64), torch.randn(1, 3, 5, 5)
    wanted = model[0](x), model[1](image)
    for layer in model:
        layer.to(dtype=torch.float8_e4m3fn, non_blocking=True)
    assert all(t.dtype == before[n].dtype for n, t in stored(model).items()) and same_numbers(model, before)
    for layer in model:
        layer.to(dtype=torch.float32)
    assert torch.equal(model[0](x), wanted[0]) and torch.equal(model[1](image), wanted[1])


def test_the_layerwise_casting_of_diffusers_keeps_scales():
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"), attention_head_dim=8,
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    freeze(quantize(unet, "int4"))
    before = {name: tensor.clone() for name, tensor in stored(unet).items()}
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with torch.no_grad():
        assert torch.isfinite(unet(torch.randn(1, 3, 8, 8), 1).sample).all()
    assert any(tensor.dtype == torch.float8_e4m3fn for tensor in unet.state_dict().values())
    assert same_numbers(unet, before) and all(t.dtype == before[n].dtype for n, t in stored(unet).items())


@pytest.mark.parametrize("weights", TYPES)
def test_a_model_that_peft_has_prepared_has_the_same_scales_and_is_saved_as_it_is(weights, tmp_path):
    model = load(weights)
    before = {name: tensor.clone() for name, tensor in stored(model).items()}
    peft.prepare_model_for_kbit_training(model)
    assert model.model.norm.weight.dtype == torch.float32 and same_numbers(model, before)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    made = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(made), wanted) and same_numbers(made, before)
