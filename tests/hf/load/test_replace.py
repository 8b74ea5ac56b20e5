"""replace_with_quanto_layers, with the arguments and results of transformers 4.4x."""

import inspect
import warnings

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from tiny_models import TEXT, llama_config, qlinears
from torch import nn

from quanto_hf import QLinear, QuantoConfig, replace_with_quanto_layers


def bloom():
    """The model of transformers' own tests of this function, on meta: a tied head, layer norms, biases."""
    config = transformers.BloomConfig(**TEXT, hidden_size=64, n_layer=2, n_head=4)
    with init_empty_weights():
        return transformers.AutoModelForCausalLM.from_config(config)


def count(model, cls):
    return sum(isinstance(module, cls) for module in model.modules())


def test_the_arguments_are_those_of_transformers_4():
    parameters = inspect.signature(replace_with_quanto_layers).parameters
    assert {name: p.default for name, p in parameters.items()} == {
        "model": inspect.Parameter.empty,
        "quantization_config": None,
        "modules_to_not_convert": None,
        "current_key_name": None,
        "has_been_replaced": False,
    }


@pytest.mark.parametrize("own", [QuantoConfig, transformers.QuantoConfig], ids=["quanto_hf", "transformers"])
def test_every_linear_layer_is_replaced(own):
    model = bloom()
    linears = count(model, nn.Linear)
    replaced, was = replace_with_quanto_layers(model, quantization_config=own(weights="int8"))
    assert replaced is model and was is True
    assert (count(model, QLinear), count(model, nn.Linear)) == (linears, linears)


def test_layers_round_their_inputs_where_activations_are_quantized():
    model = bloom()
    linears = count(model, nn.Linear)
    replace_with_quanto_layers(model, QuantoConfig(weights="int8", activations="int8"))
    assert count(model, QLinear) == linears
    assert {module.activations.name for module in model.modules() if isinstance(module, QLinear)} == {"int8"}


def test_modules_not_to_convert_are_kept():
    model = bloom()
    linears = count(model, nn.Linear)
    replace_with_quanto_layers(model, QuantoConfig(weights="int8"), modules_to_not_convert=["lm_head"])
    assert count(model, QLinear) == linears - 1 and type(model.lm_head) is nn.Linear


def test_modules_not_to_convert_add_to_those_of_the_config():
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("fc1", "fc10", "fc2")})
    config = QuantoConfig(modules_to_not_convert=["fc1"])
    replace_with_quanto_layers(model, config, modules_to_not_convert=["fc2"])
    assert list(qlinears(model)) == ["fc10"]
    assert config.modules_to_not_convert == ["fc1"]


def test_patterns_see_the_whole_name_when_the_model_is_a_part_of_a_larger_one():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for current, left in ((["model", "layers"], ["0.fc"]), (["other", "layers"], []), (None, [])):
            model = nn.ModuleDict({name: nn.ModuleDict({"fc": nn.Linear(8, 8)}) for name in "01"})
            patterns = ["model.layers.0"] if current else None
            replace_with_quanto_layers(model, QuantoConfig(), patterns, current_key_name=current)
            assert sorted(qlinears(model)) == [name for name in ("0.fc", "1.fc") if name not in left]


@pytest.mark.parametrize("before", [False, True])
def test_has_been_replaced_is_handed_back_if_nothing_is_replaced(before):
    with pytest.warns(UserWarning, match="no linear layer of this model has been replaced"):
        result = replace_with_quanto_layers(nn.Sequential(nn.ReLU()), QuantoConfig(), has_been_replaced=before)
    assert result[1] is before


def test_has_been_replaced_is_true_if_something_is():
    assert replace_with_quanto_layers(nn.Sequential(nn.Linear(8, 8)), has_been_replaced=False)[1] is True


def test_new_layers_are_on_meta_without_gradients_and_wait_for_a_float_weight():
    model = nn.Sequential(nn.Linear(64, 32, dtype=torch.bfloat16))
    replace_with_quanto_layers(model, QuantoConfig(weights="int4"))
    layer = model[0]
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert not layer.is_frozen and layer.weight.shape == (32, 64) and layer.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for n, p in layer.named_parameters() if n.startswith("weight"))


def test_overrides_of_the_config_count():
    with init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(llama_config())
    overrides = {"down_proj": {"weights": "int8"}, "layers.0.mlp": {"weights": None}}
    replace_with_quanto_layers(model, QuantoConfig(weights="int4", overrides=overrides), ["lm_head"])
    made = {name: str(layer.scheme) for name, layer in qlinears(model).items()}
    assert made["model.layers.1.mlp.down_proj"] == "int8"
    assert made["model.layers.1.mlp.up_proj"] == "int4 g64 asym"
    assert "model.layers.0.mlp.up_proj" not in made
