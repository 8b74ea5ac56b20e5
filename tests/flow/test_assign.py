"""Which scheme each module gets, and the reason of each module that stays float."""

import warnings

import pytest
import torch
from torch import nn

from quanto_hf import dequantize, freeze, quantize
from quanto_hf.flow import Choice, apply_assignment, assign, replace_modules
from quanto_hf.nn import QLinear
from quanto_hf.nn.registry import QUANTIZE
from quanto_hf.qtypes import qint8


class Block(nn.Module):
    """Two linear layers of one name stem and a norm."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc10, self.norm = nn.Linear(32, 64), nn.Linear(64, 32), nn.LayerNorm(32)

    def forward(self, x):
        return self.norm(self.fc10(self.fc1(x).relu()))


def model():
    return nn.ModuleDict({"a": Block(), "b": Block()})


INT8 = Choice("int8")


def test_every_linear_layer_is_chosen_when_nothing_is_excluded():
    assignment = assign(model(), INT8)
    assert list(assignment.chosen) == ["a.fc1", "a.fc10", "b.fc1", "b.fc10"]
    assert assignment.left == {}


def test_an_excluded_module_is_left_with_the_pattern_in_its_reason():
    assignment = assign(model(), INT8, exclude=["fc1"])
    assert list(assignment.chosen) == ["a.fc10", "b.fc10"]
    assert assignment.left["a.fc1"] == "it matches 'fc1' of the modules not to convert"


def test_only_included_modules_are_chosen():
    assignment = assign(model(), INT8, include=["b"], exclude=["b.fc1"])
    assert list(assignment.chosen) == ["b.fc10"]
    assert assignment.left["a.fc1"] == "no pattern of the modules to include matches it"


def test_a_default_skip_gives_its_own_reason():
    assignment = assign(model(), INT8, skip={"a.fc1": "because"})
    assert assignment.left == {"a.fc1": "because"}


def test_a_pattern_that_matches_nothing_warns_with_near_misses():
    with pytest.warns(UserWarning, match=r"'fc11' matches no module of this model; did you mean .*'a\.fc1'"):
        assign(model(), INT8, exclude=["fc11"])


def test_patterns_that_match_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assign(model(), INT8, exclude=["fc1"], include=["a", "fc10"], overrides={"*.fc10": {"weights": "int4"}})


def test_the_first_override_that_matches_counts():
    assignment = assign(
        model(), Choice("int4", 32), overrides={"a.fc1": {"weights": "int8"}, "a": {"group_size": 128}, "b": {}}
    )
    assert assignment.chosen["a.fc1"] == Choice("int8")
    assert assignment.chosen["a.fc10"] == Choice("int4", 128)
    assert assignment.chosen["b.fc1"] == Choice("int4", 32)


def test_another_number_type_in_an_override_starts_from_its_own_defaults():
    assignment = assign(model(), Choice("int4", 32, False, "minmax"), overrides={"fc1": {"weights": "int8"}})
    assert str(assignment.chosen["a.fc1"].scheme()) == "int8"


def test_an_override_may_leave_modules_in_float():
    assignment = assign(model(), INT8, overrides={"fc1": {"weights": None}})
    assert assignment.left == {name: "an override leaves 'fc1' in float" for name in ("a.fc1", "b.fc1")}


def test_only_modules_of_the_types_that_are_asked_for_are_taken_and_no_subclass_of_them():
    net = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "fc": nn.Linear(8, 8), "embed": nn.Embedding(4, 8)})
    assert list(assign(net, INT8).chosen) == ["fc"]
    assert list(assign(net, INT8, verb=QUANTIZE).chosen) == ["conv", "fc"]


def test_a_weight_that_is_tied_to_an_embedding_stays_float():
    net = nn.ModuleDict({"embed": nn.Embedding(16, 32), "middle": nn.Linear(32, 32), "head": nn.Linear(32, 16)})
    net["head"].weight = net["embed"].weight
    assignment = assign(net, INT8)
    assert list(assignment.chosen) == ["middle"]
    assert assignment.left == {"head": "its weight is tied to embed.weight"}


def test_two_linear_layers_with_one_weight_get_one_scheme_or_stay_float_together():
    net = nn.ModuleDict({"first": nn.Linear(8, 8, bias=False), "second": nn.Linear(8, 8, bias=False)})
    net["second"].weight = net["first"].weight
    assert list(assign(net, INT8).chosen) == ["first", "second"] and not assign(net, INT8).left
    left = assign(net, INT8, exclude=["second"]).left
    assert left["second"] == "it matches 'second' of the modules not to convert"
    assert left["first"].startswith("its weight is tied to second.weight, which stays float: it matches")
    x = torch.randn(3, 8)
    quantize(net, "int8")
    prepared = net["second"](x)
    freeze(net)
    assert net["first"].weight_packed is net["second"].weight_packed
    assert torch.equal(net["first"](x), prepared) and torch.equal(net["second"](x), prepared)
    dequantize(net)
    assert type(net["first"]) is nn.Linear and net["first"].weight is net["second"].weight


def test_the_out_projection_of_multihead_attention_goes_with_the_attention():
    # torch's attention reads it by its weight
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)})
    assert list(assign(net, INT8).chosen) == ["attention.in_proj_weight", "attention.out_proj"]
    assert list(assign(net, INT8, exclude=["out_proj"]).chosen) == ["attention.in_proj_weight"]
    without = assign(net, INT8, exclude=["in_proj_weight"])
    assert not without.chosen and "reads its weight" in without.left["attention.out_proj"]
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2, kdim=8)})
    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"]
    assert list(assign(net, INT8).chosen) == [f"attention.{name}" for name in names]


def test_a_module_with_two_names_becomes_one_module():
    shared = nn.Linear(8, 8)
    net = nn.ModuleDict({"first": shared, "second": shared})
    apply_assignment(net, assign(net, INT8))
    assert isinstance(net["first"], QLinear) and net["first"] is net["second"]


def test_a_plan_shares_the_parameters_and_the_hooks_of_what_it_replaces():
    net, calls = model(), []
    old, bias = net["a"].fc1, net["a"].fc1.bias
    old.register_forward_hook(lambda *_: calls.append("after"))
    old.register_forward_pre_hook(lambda *_, **__: calls.append("before"), with_kwargs=True)
    apply_assignment(net, assign(net, INT8), qint8)
    assert isinstance(net["a"].fc1, QLinear) and net["a"].fc1.activations is qint8
    assert net["a"].fc1.weight is old.weight and net["a"].fc1.bias is bias
    net["a"](torch.randn(2, 32))
    assert calls == ["before", "after"]


def test_a_bare_linear_layer_cannot_be_replaced_in_place():
    bare = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"the model is a bare Linear.*wrap it: torch.nn.Sequential"):
        replace_modules(bare, {bare: nn.Linear(8, 8)})


def test_a_transposed_convolution_is_judged_by_the_rows_that_are_stored():
    # AQLM needs columns in blocks of 8; a row of a transposed convolution is an output channel over inputs and kernel
    choice = Choice("aqlm-1x8")
    fits, does_not = nn.ConvTranspose1d(8, 3, 5), nn.ConvTranspose1d(3, 8, 5)
    assignment = assign(nn.ModuleList([fits, does_not]), choice, include=["0", "1"])
    assert list(assignment.chosen) == ["0"]
    assert assignment.left["1"].startswith("in_features=15 is not a multiple of the 8")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_what_takes_no_fewer_bytes_packed_stays_float_unless_it_is_named(kind):
    net = nn.ModuleDict({"thin": nn.Linear(1, 40), "small": nn.Linear(8, 8)}).to(torch.bfloat16)
    found = assign(net, Choice(kind))
    assert list(found.chosen) == ["small"]
    assert "bytes as int" in found.left["thin"] and "no fewer than its 80 in float" in found.left["thin"]
    named = assign(net, Choice(kind), overrides={"thin": {"weights": kind}})
    assert list(named.chosen) == ["thin", "small"] and not named.left
