"""The hooks of transformers 4 do their job for code that still calls them."""

import pytest
import torch
from accelerate import init_empty_weights
from tiny_models import llama_config
from torch import nn
from transformers import AutoModelForCausalLM

from quanto_hf import QLinear, QuantoConfig, QuantoHfQuantizer, quantize
from quanto_hf.flow import freeze

NAME = "model.layers.0.mlp.up_proj"


def quantizer(weights="int8"):
    return QuantoHfQuantizer(QuantoConfig(weights=weights), pre_quantized=False)


def prepared(made):
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(llama_config())
    made.preprocess_model(model, dtype=torch.float32)
    return model


def test_check_quantized_param_is_true_for_float_weights_of_quantized_layers_only():
    made = quantizer()
    model = prepared(made)
    asked = {
        f"{NAME}.weight": True,
        f"{NAME}.weight_packed": False,
        "lm_head.weight": False,
        "model.norm.weight": False,
        "model.embed_tokens.weight": False,
        "model.layers.9.mlp.up_proj.weight": False,
    }
    found = {n: made.check_quantized_param(model, torch.zeros(1), n, state_dict={}, param_device="cpu") for n in asked}
    assert found == asked


@pytest.mark.parametrize("weights", ["int8", "int4", "int2", "float8", "nf4", "fp4"])
def test_create_quantized_param_quantizes_the_weight_where_it_goes(weights):
    made, weight = quantizer(weights), torch.randn(128, 64)
    model = prepared(made)
    made.create_quantized_param(model, weight, f"{NAME}.weight", torch.device("cpu"), {}, [])
    layer = model.get_submodule(NAME)
    assert layer.is_frozen and {t.device.type for t in layer.tensors().values()} == {"cpu"}
    wanted = freeze(quantize(nn.Sequential(linear(weight)), weights=weights))[0]
    assert torch.equal(layer.weight, wanted.weight)
    assert not made.check_quantized_param(model, weight, f"{NAME}.weight")


def linear(weight):
    made = nn.Linear(*weight.shape[::-1], bias=False)
    made.weight = nn.Parameter(weight)
    return made


def test_create_quantized_param_refuses_other_parameters():
    made = quantizer()
    with pytest.raises(ValueError, match=r"model\.norm\.weight is not the float weight of a quantized layer"):
        made.create_quantized_param(prepared(made), torch.ones(64), "model.norm.weight", "cpu")


def test_update_missing_keys_leaves_out_what_a_float_checkpoint_cannot_have():
    made = quantizer("int4")
    model = prepared(made)
    missing = [f"{NAME}.weight_{part}" for part in ("packed", "scale", "zero")]
    kept = ["lm_head.weight", f"{NAME}.bias", "other.weight_packed"]
    assert made.update_missing_keys(model, [*missing, *kept], "") == kept
    # a base model: its names lack the prefix, or have it
    base = model.model
    assert made.update_missing_keys(base, [*missing, *kept], "model") == kept
    assert made.update_missing_keys(base, [m.removeprefix("model.") for m in missing], "model") == []


@pytest.mark.parametrize(
    ("weights", "name"),
    [("int8", "torch.int8"), ("float8", "fp8"), ("float8_e5m2", "fp8"), ("int4", "int4"), ("nf4", "int4"),
     ("fp4", "int4"), ("int2", "int2")],
)  # fmt: skip
def test_adjust_target_dtype_has_the_size_of_a_weight(weights, name):
    found = quantizer(weights).adjust_target_dtype(torch.bfloat16)
    assert str(getattr(found, "value", found)) == name


def test_update_torch_dtype_is_float32_unless_one_is_given():
    assert quantizer().update_torch_dtype(None) == torch.float32
    assert quantizer().update_torch_dtype(torch.bfloat16) == torch.bfloat16


def test_the_old_way_through_all_hooks_gives_a_whole_model():
    made = quantizer("int4")
    source = AutoModelForCausalLM.from_config(llama_config()).eval()
    model = prepared(made)
    missing = made.update_missing_keys(model, [n for n, _ in model.named_parameters()], "")
    for name, value in source.state_dict().items():
        if made.check_quantized_param(model, value, name):
            made.create_quantized_param(model, value, name, "cpu")
        else:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = nn.Parameter(value)
    assert not any("weight_" in name for name in missing)
    assert sum(isinstance(m, QLinear) and m.is_frozen for m in model.modules()) == 14
    assert not any(p.is_meta for p in model.parameters())
