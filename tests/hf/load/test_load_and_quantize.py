"""load_and_quantize_model: one call from a path to a quantized model."""

import json

import pytest
import torch
import transformers
from tiny_models import TINY, output, qlinears, save

from quanto_hf import QuantoConfig, load_and_quantize_model


@pytest.mark.parametrize("name", ["llama", "bert", "whisper", "vit"])
def test_the_class_that_the_checkpoint_names_is_loaded_in_int8(name, tmp_path):
    model = load_and_quantize_model(save(name, tmp_path))
    assert type(model) is TINY[name].cls and not model.training
    assert {str(layer.scheme) for layer in qlinears(model).values()} == {"int8"}


def test_a_config_and_arguments_of_from_pretrained_are_passed_on(tmp_path):
    model = load_and_quantize_model(str(save("llama", tmp_path)), QuantoConfig("int4"), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert {str(layer.scheme) for layer in qlinears(model).values()} == {"int4 g64 asym"}


def test_another_class_can_be_asked_for(tmp_path):
    model = load_and_quantize_model(save("llama", tmp_path), auto_class=transformers.AutoModel)
    assert type(model) is transformers.LlamaModel and len(qlinears(model)) == TINY["llama"].eligible


@pytest.mark.parametrize("auto_class", [None, transformers.AutoModelForCausalLM, TINY["llama"].cls], ids=str)
def test_a_quantized_checkpoint_is_loaded_as_it_was_saved(auto_class, tmp_path):
    model = load_and_quantize_model(save("llama", tmp_path / "float"), QuantoConfig("nf4"))
    model.save_pretrained(tmp_path / "saved")
    reloaded = load_and_quantize_model(tmp_path / "saved", auto_class=auto_class)
    assert {str(layer.scheme) for layer in qlinears(reloaded).values()} == {"nf4 g32"}
    assert torch.equal(output(reloaded, "llama"), output(model, "llama"))


@pytest.mark.parametrize(("named", "text"), [(["NoSuchModel"], "names NoSuchModel"), ([], "names no class")])
def test_a_checkpoint_that_names_no_known_class_asks_for_one(named, text, tmp_path):
    save("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": named}))
    with pytest.raises(ValueError, match=f"{text}, which transformers .* has not; pass auto_class"):
        load_and_quantize_model(tmp_path)
