"""quantize() of a transformers model: it is saved and loaded like one that was quantized while it was loaded."""

import copy

import pytest
import torch
import transformers
from tiny_models import TINY, build, output, qlinears

import quanto_hf
from quanto_hf import QuantoConfig, freeze, quantize
from quanto_hf.fit import FITS, Fit, Hqq, fit_by_name
from quanto_hf.nn import QConv2d


class OwnFit(Fit):
    """Not registered, so that nobody finds it by a name."""

    name = "own"

    def __call__(self, values, grid, dtype):
        return fit_by_name("minmax")(values, grid, dtype)


def reloaded(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


ARGUMENTS = {
    "types": {"weights": quanto_hf.qint4, "activations": quanto_hf.qint8},
    "overrides": {"weights": "int4", "overrides": {"down_proj": {"weights": quanto_hf.qint8}}},
    "optimizer": {"weights": "int4", "optimizer": quanto_hf.HqqOptimizer()},
    "own-optimizer": {"weights": "int4", "optimizer": OwnFit()},
    "include": {"weights": "int8", "include": "layers.0"},
    "exclude": {"weights": "int8", "exclude": ["q_proj", "layers.1.mlp"]},
    "groups": {"weights": "int4", "group_size": 32, "symmetric": True},
}


@pytest.mark.parametrize("kwargs", ARGUMENTS.values(), ids=ARGUMENTS)
def test_every_argument_survives_a_reload(kwargs, tmp_path):
    model = quantize(build("llama"), **kwargs)
    before = output(model, "llama")
    assert torch.equal(output(freeze(model), "llama"), before)
    made = reloaded(model, tmp_path)
    assert torch.equal(output(made, "llama"), before)
    assert {n: m.scheme for n, m in qlinears(made).items()} == {n: m.scheme for n, m in qlinears(model).items()}


def test_the_saved_config_says_what_was_asked_for(tmp_path):
    model = quantize(build("llama"), "int4", exclude="q_proj", overrides={"down_proj": {"weights": "int8"}})
    config = reloaded(freeze(model), tmp_path).config.quantization_config
    assert config.weights == "int4" and config.modules_to_not_convert == ["q_proj"]
    assert config.overrides == {"down_proj": {"weights": "int8"}} and not config.qat


def test_it_can_be_trained_before_it_is_frozen_and_not_after():
    model = quantize(build("llama"), "int4")
    assert model.is_quantized and model.hf_quantizer.is_qat_trainable
    assert all(layer.weight.requires_grad for layer in qlinears(model).values())
    freeze(model)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".weight_" in n)


def test_convolutions_and_tied_heads_are_saved_too(tmp_path):
    model = freeze(quantize(build("vit"), "int8", "int8"))
    made = reloaded(model, tmp_path / "vit")
    assert isinstance(made.vit.embeddings.patch_embeddings.projection, QConv2d)
    assert torch.equal(output(made, "vit"), output(model, "vit"))
    tied = freeze(quantize(build("llama-tied"), "int4"))
    made = reloaded(tied, tmp_path / "tied")
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert torch.equal(output(made, "llama-tied"), output(tied, "llama-tied"))


@pytest.mark.parametrize("way", ["quantize", "from_pretrained"])
def test_a_quantized_model_is_not_quantized_again(way, tmp_path):
    model = build("llama")
    if way == "quantize":
        quantize(model)
    else:
        model.save_pretrained(tmp_path)
        model = TINY["llama"].cls.from_pretrained(tmp_path, quantization_config=QuantoConfig())
    with pytest.raises(ValueError, match="is quantized already, with quanto_hf; quantize the float model"):
        quantize(model, "int4")


class Another(Hqq):
    """Has the name of a registered fit, and computes something else."""


@pytest.mark.parametrize(
    "fit, name",
    [
        (Hqq(p=0.5), None), (Hqq(iterations=3), None), (Another(), None), (OwnFit(), None),
        (Hqq(), "hqq"), (quanto_hf.HqqOptimizer(p=0.7), "hqq"), ("hqq", "hqq"), (copy.deepcopy(FITS["mse"]), "mse"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("where", ["all", "override"])
def test_a_fit_is_recorded_by_its_name_only_if_the_name_finds_the_same(fit, name, where, tmp_path):
    kwargs = {"optimizer": fit} if where == "all" else {"overrides": {"down_proj": {"fit": fit}}}
    model = quantize(build("llama"), "int4", **kwargs)
    config = model.config.quantization_config
    assert (config.fit if where == "all" else config.overrides["down_proj"]["fit"]) == name
    made = reloaded(model, tmp_path)
    found = next(layer for layer_name, layer in qlinears(made).items() if "down_proj" in layer_name).fit
    # what is trained on has the default fit, and no other one under the same name
    assert found == name


def test_a_value_that_is_not_allowed_leaves_the_model_as_it_was():
    model = build("llama")
    for kwargs in ({"weights": "int3"}, {"overrides": {"q_proj": {"weights": "int5"}}}, {"static_activations": True}):
        with pytest.raises(ValueError):
            quantize(model, **kwargs)
        assert not qlinears(model) and not hasattr(model, "hf_quantizer")


def test_a_dequantized_model_is_saved_in_float(tmp_path):
    model = freeze(quantize(build("llama"), "int4"))
    wanted = output(quanto_hf.dequantize(model), "llama")
    made = reloaded(model, tmp_path)
    assert not qlinears(made) and torch.equal(output(made, "llama"), wanted)


def test_third_party_code_sees_a_linear():
    layer = freeze(quantize(build("llama"), "int4")).model.layers[0].mlp.up_proj
    x = torch.randn(3, 64)
    assert isinstance(layer, torch.nn.Linear) and (layer.in_features, layer.out_features) == (64, 128)
    assert layer.weight.shape == (128, 64) and layer.weight.dtype == torch.float32 and layer.weight.device == x.device
    torch.testing.assert_close(torch.nn.functional.linear(x, layer.weight), layer(x), rtol=1e-5, atol=1e-5)
    # a LoRA beside it trains, and the base does not
    down, up = torch.nn.Linear(64, 4, bias=False), torch.nn.Linear(4, 128, bias=False)
    (layer(x) + up(down(x))).sum().backward()
    assert down.weight.grad is not None and all(p.grad is None for p in layer.parameters())


def test_a_model_of_no_transformers_is_quantized_by_the_same_verb():
    model = quantize(torch.nn.Sequential(torch.nn.Linear(8, 8)), "int8")
    assert qlinears(model) and not hasattr(model, "hf_quantizer")
    assert transformers.PreTrainedModel not in type(model).__mro__
