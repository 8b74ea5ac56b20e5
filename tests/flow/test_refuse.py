"""What the verbs refuse before they change anything: weights in other dtypes, and layers that are quantized already."""

import copy
from collections import OrderedDict

import pytest
import torch
import transformers
from tiny_models import llama_config, save
from torch import nn

import quanto_hf
from quanto_hf import QLinear, QuantoConfig, dequantize, freeze, freeze_aqlm, quantize, requantize

OTHERS = [torch.float64, torch.complex64, torch.int8, torch.float8_e4m3fn]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Sequential(nn.Linear(64, 64)), nn.Conv2d(3, 4, 3))


def in_dtype(model, dtype, names=("0", "2.0", "3")):
    """Without what some dtypes have no kernels for."""
    for name in names:
        layer = model.get_submodule(name)
        for leaf in ("weight", "bias"):
            values = getattr(layer, leaf).detach().to(dtype)
            setattr(layer, leaf, nn.Parameter(values, requires_grad=values.is_floating_point()))
    return model


def unchanged(model, before):
    mine, theirs = model.state_dict(), before.state_dict()
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert all(mine[name] is not None and mine[name].dtype == theirs[name].dtype for name in theirs)
    assert mine.keys() == theirs.keys()


@pytest.mark.parametrize("weights", ["int8", "int4", "nf4", "float8", "aqlm-1x4"])
@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_a_weight_in_another_dtype_is_refused_and_named(dtype, weights):
    model = in_dtype(net(), dtype, ["2.0"])
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=rf"2\.0 \({dtype}\): a weight .*float32, bfloat16 or float16; convert"):
        quantize(model, weights)
    unchanged(model, before)
    # the others can be
    assert type(quantize(model, weights, exclude="2.0")[0]) is QLinear


def test_all_of_a_double_model_are_named_in_short():
    with pytest.raises(
        ValueError, match=r"0 \(torch.float64\), 2.0 \(torch.float64\), 3 \(torch.float64\): .*model\.fl"
    ):
        quantize(net().double())
    with pytest.raises(ValueError, match=r"0 \(torch.float64\), 1 \(torch.float64\), 2 \(torch.float64\) and 7 more: "):
        quantize(nn.Sequential(*(nn.Linear(8, 8) for _ in range(10))).double())


@pytest.mark.parametrize("verb", ["freeze", "freeze_aqlm"])
def test_layers_that_were_converted_after_they_were_prepared_are_refused(verb):
    model = quantize(net(), "aqlm-1x4").double()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"0 \(torch.float64\)"):
        freeze(model) if verb == "freeze" else freeze_aqlm(model, progress=False)
    unchanged(model, before)


def test_requantize_refuses_a_double_model():
    frozen = freeze(quantize(net()))
    model = net().double()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"0 \(torch.float64\)"):
        requantize(model, frozen.state_dict(), quanto_hf.quantization_map(frozen))
    unchanged(model, before)


@pytest.mark.parametrize("verb", ["quantize", "plan", "replace"])
def test_models_of_transformers_are_refused_too(verb):
    model = transformers.LlamaForCausalLM(llama_config()).double()
    before = copy.deepcopy(model)
    verbs = {
        "quantize": lambda: quantize(model),
        "plan": lambda: quanto_hf.plan(model),
        "replace": lambda: quanto_hf.replace_with_quanto_layers(model, QuantoConfig()),
    }
    with pytest.raises(ValueError, match=r"torch\.float64"):
        verbs[verb]()
    unchanged(model, before)
    assert getattr(model, "hf_quantizer", None) is None


def test_a_layer_that_a_model_of_transformers_makes_in_float64_is_named(tmp_path):
    class Mixed(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.model.layers[0].mlp.up_proj.double()

    save("llama", tmp_path)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj \(torch\.float64\)"):
        Mixed.from_pretrained(tmp_path, quantization_config=QuantoConfig())


# ----------------------------------------------------------------------------------------------- quantized already


@pytest.mark.parametrize("frozen", [False, True], ids=["prepared", "frozen"])
@pytest.mark.parametrize(
    "again",
    [
        {"weights": "int4"},
        {"activations": "int8"},
        {"group_size": 32},
        {"optimizer": "minmax"},
        {"weights": "aqlm-1x4"},
    ],
    ids=str,
)
def test_what_is_quantized_is_not_quantized_in_another_way(again, frozen):
    model = quantize(net(), "int8")
    if frozen:
        freeze(model)
    layers = list(model.modules())
    text = r"quantized already: 0 \(int8\), 2\.0 \(int8\), 3 \(int8\)\. .*dequantize\(model\) first.*include=.*exclude="
    with pytest.raises(ValueError, match=text):
        quantize(model, **again)
    assert all(a is b for a, b in zip(layers, model.modules(), strict=True))
    with pytest.raises(ValueError, match=r"2\.0 \(int8\)"):
        quantize(model, overrides={"2": {"weights": "int4"}})


def test_the_same_once_more_changes_nothing():
    model = quantize(net(), "int4", activations="int8")
    layers = list(model.modules())
    quantize(model, "int4", activations="int8")
    assert all(a is b for a, b in zip(layers, model.modules(), strict=True))


def named():
    return nn.Sequential(OrderedDict(a=nn.Linear(64, 64), b=nn.Linear(64, 64), c=nn.Conv2d(3, 4, 3)))


def test_other_patterns_go_on_with_what_is_still_float():
    model = quantize(named(), "int8", include="a")
    quantize(model, "int4", include="b")
    quantize(model, "int8", exclude=["a", "b"])
    assert [str(layer.scheme) for layer in model] == ["int8", "int4 g64 asym", "int8"]
    # an override that leaves it in float does not ask for it either
    quantize(model, "int8", overrides={"b": {"weights": None}})


def test_a_pattern_that_asks_for_both_is_refused_and_names_only_what_is_quantized():
    model = quantize(named(), "int8", include="a")
    with pytest.raises(ValueError, match=r"quantized already: a \(int8\)\. "):
        quantize(model, "int4")
    assert type(model.b) is nn.Linear


def test_after_dequantize_it_can_be_quantized_anew():
    model = dequantize(freeze(quantize(net(), "int8")))
    assert str(quantize(model, "int4")[0].scheme) == "int4 g64 asym"


def test_a_head_that_stays_float_by_default_is_not_asked_for_the_second_time():
    model = nn.ModuleDict({"lm_head": nn.Linear(64, 64), "fc": nn.Linear(64, 64)})
    quantize(model, "int8", include="lm_head")
    assert str(quantize(model, "int4")["fc"].scheme) == "int4 g64 asym"
