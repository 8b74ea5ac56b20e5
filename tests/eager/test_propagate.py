"""C1 to C3 and C8: which module gets which qconfig, what is left out, what is refused, where stubs go."""

import copy

import pytest
import torch
from torch import nn

from quanto_hf import eager
from quanto_hf.eager import (
    DeQuantStub,
    MinMaxObserver,
    QConfig,
    QuantStub,
    QuantWrapper,
    add_quant_dequant,
    default_per_channel_qconfig,
    default_qconfig,
    float_qparams_weight_only_qconfig,
    prepare,
    propagate_qconfig_,
    quantize,
)

A, B, C, D = (QConfig(MinMaxObserver.with_args(quant_max=n, quant_min=0), MinMaxObserver) for n in (15, 31, 63, 127))


class Tree(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU()
        self.n = nn.Sequential(nn.Linear(2, 2), nn.ReLU())


RULES = {nn.Linear: "A", "a": "B", "": "C", "b": "B", "n": None}
EXPECTED = {"": "C", "a": "B", "b": "D", "c": "C", "n": None, "n.0": "A", "n.1": None}


def assigned(model, qconfigs):
    names = {id(value): name for name, value in qconfigs.items()}
    return {name: names.get(id(module.qconfig)) for name, module in model.named_modules()}


def test_c1_parent_type_name_and_own_attribute_count_in_this_order():
    model, qconfigs = Tree(), {"A": A, "B": B, "C": C, "D": D, None: None}
    model.b.qconfig = D
    assert propagate_qconfig_(model, {key: qconfigs[value] for key, value in RULES.items()}) is None
    assert assigned(model, qconfigs) == EXPECTED


def test_c1_torch_gives_the_same(ao):
    highest = {"A": 15, "B": 31, "C": 63, "D": 127, None: None}
    qconfigs = {
        name: n and ao.QConfig(ao.MinMaxObserver.with_args(quant_min=0, quant_max=n), ao.MinMaxObserver)
        for name, n in highest.items()
    }
    model = Tree()
    model.b.qconfig = qconfigs["D"]
    ao.propagate_qconfig_(model, {key: qconfigs[value] for key, value in RULES.items()})
    # torch wraps constructors: what they make is compared
    found = {name: module.qconfig and module.qconfig.activation().quant_max for name, module in model.named_modules()}
    assert found == {name: highest[value] for name, value in EXPECTED.items()}


def test_c1_the_model_is_changed_only_if_everything_is_right():
    model = Tree()
    with pytest.raises(TypeError, match="bad"):
        propagate_qconfig_(model, {"a": A, "b": "bad"})
    with pytest.raises(TypeError, match="42"):
        propagate_qconfig_(model, {42: A})
    assert not any(hasattr(module, "qconfig") for module in model.modules())
    model.n[0].qconfig = "bad"
    with pytest.raises(TypeError, match=r"n\.0"):
        propagate_qconfig_(model, {"a": A})
    assert not hasattr(model.a, "qconfig")


def test_c1_qconfigs_of_torch_are_refused_by_name(ao):
    with pytest.raises(TypeError, match=r"torch\.ao"):
        propagate_qconfig_(nn.Linear(2, 2), {"": ao.default_qconfig})


@pytest.mark.parametrize(
    "config",
    [
        {"non_traceable_module_name": ["left"]},
        {"non_traceable_module_name": ["deep.deeper.left"]},
        {"non_traceable_module_class": [nn.GRU]},
    ],
    ids=["last-name", "whole-name", "class"],
)
def test_c2_modules_are_left_out_at_any_depth(config):
    model = nn.Module()
    model.deep = nn.Module()
    model.deep.deeper = nn.Module()
    model.deep.deeper.left, model.deep.deeper.right = nn.GRU(2, 2), nn.Linear(2, 2)
    model.deep.deeper.left.inner = nn.Linear(2, 2)
    propagate_qconfig_(model, {"": A}, config)
    assert model.deep.deeper.right.qconfig is A
    assert not hasattr(model.deep.deeper.left, "qconfig") and not hasattr(model.deep.deeper.left.inner, "qconfig")


def test_c2_prepare_leaves_them_out_too():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)).eval()
    model.qconfig = default_qconfig
    made = prepare(model, prepare_custom_config_dict={"non_traceable_module_name": ["0.0"]})
    assert not hasattr(made[0][0], "activation_post_process") and hasattr(made[1], "activation_post_process")


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_c3_transposed_convolutions_have_one_scale(dims):
    layer = getattr(nn, f"ConvTranspose{dims}d")(2, 3, 3)
    text = rf"Per channel weight observer is not supported yet for ConvTranspose{dims}d\."
    for kind in (AssertionError, ValueError):
        with pytest.raises(kind, match=text):
            propagate_qconfig_(layer, {"": default_per_channel_qconfig})
    propagate_qconfig_(layer, {"": None})
    model = QuantWrapper(getattr(nn, f"ConvTranspose{dims}d")(2, 3, 3))
    model.qconfig = default_qconfig
    x = torch.randn(2, 2, *[4] * dims)
    made = quantize(model, lambda model: model(x), [])
    assert torch.linalg.norm(made(x) - model(x)) < 0.05 * torch.linalg.norm(model(x))
    assert made(x).shape == model(x).shape


@pytest.mark.parametrize("layer", [nn.Embedding(10, 4), nn.EmbeddingBag(10, 4)], ids=["embedding", "bag"])
def test_c3_embeddings_need_float_zero_points(layer):
    layer = copy.deepcopy(layer).eval()
    layer.qconfig = default_qconfig
    for kind in (AssertionError, ValueError):
        with pytest.raises(kind, match="float_qparams_weight_only_qconfig"):
            eager.convert(prepare(layer))
    layer.qconfig = None
    assert type(eager.convert(layer)) is type(layer)
    layer.qconfig = float_qparams_weight_only_qconfig
    assert type(eager.convert(layer)) is not type(layer)


def test_c3_an_observer_in_place_of_its_class_is_refused():
    with pytest.raises(ValueError, match="MinMaxObserver"):
        QConfig(MinMaxObserver(), MinMaxObserver)
    with pytest.raises(TypeError, match="'minmax'"):
        QConfig("minmax", MinMaxObserver)


def test_c8_leaves_with_a_qconfig_are_wrapped_in_place():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.Linear(2, 2)))
    propagate_qconfig_(model, {nn.Linear: A})
    inner = model[0]
    assert add_quant_dequant(model) is model
    assert type(model[0]) is QuantWrapper and model[0].module is inner and type(model[1]) is nn.ReLU
    assert type(model[2][0]) is QuantWrapper and model[0].quant.qconfig is A
    # a second time changes nothing
    before = list(model.modules())
    assert list(add_quant_dequant(model).modules()) == before


def test_c8_a_leaf_comes_back_in_a_wrapper_and_an_alias_stays_one():
    leaf = nn.Linear(2, 2)
    leaf.qconfig = A
    wrapper = add_quant_dequant(leaf)
    assert isinstance(wrapper, QuantWrapper) and isinstance(wrapper.quant, QuantStub)
    assert isinstance(wrapper.dequant, DeQuantStub) and add_quant_dequant(nn.Linear(2, 2)).__class__ is nn.Linear
    model = nn.ModuleDict({"one": leaf, "two": leaf})
    add_quant_dequant(model)
    assert model["one"] is model["two"] and isinstance(model["one"], QuantWrapper)
