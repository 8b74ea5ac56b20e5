"""RWKV, which divides weights of its own by powers of two in eval mode."""

import pytest
import torch
from tiny_models import TEXT, lively, relative, tokens
from transformers import RwkvConfig, RwkvForCausalLM

from quanto_hf import QuantoConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rwkv")
    config = RwkvConfig(**TEXT, hidden_size=64, num_hidden_layers=5, attention_hidden_size=64, rescale_every=2)
    lively(RwkvForCausalLM(config)).save_pretrained(folder)
    return folder


def load(folder, weights, dtype=torch.float32, **kwargs):
    config = QuantoConfig(weights, **kwargs)
    return RwkvForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype).eval()


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["int8", "int4", "nf4", "float8"])
def test_it_runs_in_eval_switches_back_and_reloads_with_the_same_bits(folder, weights, dtype, tmp_path):
    model = load(folder, weights, dtype)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = logits(model)
    scaled = "rwkv.blocks.4.feed_forward.value.weight_scale"
    assert torch.equal(model.state_dict()[scaled] * 4, state[scaled])
    # saved while it is scaled; the float model of transformers would be divided twice
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), made)
    assert torch.equal(logits(RwkvForCausalLM.from_pretrained(tmp_path)), made)
    logits(model.train())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model.eval()), made)


def test_it_is_the_float_model_with_the_dequantized_weights(folder):
    model = load(folder, "int8")
    plain = load(folder, "int8", dequantize=True)
    assert relative(logits(model), logits(plain)) < 1e-5
    assert relative(logits(model), logits(RwkvForCausalLM.from_pretrained(folder).eval())) < 0.1


def test_a_layer_that_stays_float_is_saved_as_it_was_loaded_too(folder, tmp_path):
    model = load(folder, "int8", modules_to_not_convert=["feed_forward.value"])
    made = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), made)
    assert torch.equal(logits(RwkvForCausalLM.from_pretrained(tmp_path)), made)
