"""Routers and gates stay float by one rule; wide gates are quantized."""

import pytest
import torch
from torch import nn

from quanto_hf import QLinear, quantize, report
from quanto_hf.flow.routers import REASON, routers


def experts(number=8):
    return nn.ModuleList(nn.Linear(64, 64) for _ in range(number))


def nest(name, module):
    """A model with a module under a dotted name, beside experts."""
    for segment in reversed(name.split(".")):
        module = nn.ModuleDict({segment: module})
    return nn.ModuleDict({"model": module})


class Config:
    """A config with a part, as transformers has them."""

    def __init__(self, **values):
        self.__dict__.update(values)

    def to_dict(self):
        return vars(self)


EIGHT = Config(num_experts=8, num_attention_heads=4)

ROUTERS = {
    # as the families of transformers, and models with code of their own, name them
    "mlp.gate": (64, 8),
    "block_sparse_moe.gate": (64, 8),
    "mlp.router": (64, 8),
    "mlp.router.layer": (64, 8),
    "mlp.router.classifier": (64, 8),
    "mlp.router.gate": (64, 8),
    "mlp.gate.wg": (64, 8),
    "mlp.gate.router_mlp.out_proj": (64, 9),
    "mlp.router_gate": (64, 16),
    "self_attention.experts.router.layer": (64, 8),
    "mlp.shared_expert_gate": (64, 1),
    "altup.modality_router": (64, 4),
    "expert_gate": (64, 1),
    "mlstm_layer.igate_preact": (64, 4),
    "mlstm_layer.fgate_preact": (64, 4),
    "mlstm_layer.ifgate_preact": (64, 8),
    "cell.igate": (64, 4),
    "cell.fgate": (64, 4),
}
OTHERS = {
    "mlp.gate_proj": (64, 8),
    "mlp.gate_up_proj": (64, 8),
    "mlp.experts.0.gate": (64, 8),
    "mlp.experts.0.gate_proj": (64, 8),
    "mlp.shared_expert.gate": (64, 8),
    "mlp.shared_expert.gate_proj": (64, 8),
    "gateway.gate": (64, 64),
    "self_attn.output_gate": (64, 64),
    "self_attn.q_gate_proj": (64, 64),
    "self_attn.forget_gate.f_a_proj": (64, 8),
    "per_layer_input_gate": (64, 16),
    "mlstm_layer.ogate_preact": (64, 64),
    "ffn.proj_up_gate": (64, 8),
    "mlp.router.proj": (64, 256),
    "classifier": (64, 8),
    "swg.fc": (64, 8),
    "mlp.gated": (64, 8),
    "linear_attn.in_proj_ba": (64, 8),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_a_layer_with_the_name_of_a_router_and_few_outputs_is_one(name):
    model = nest(name, nn.Linear(*ROUTERS[name]))
    assert routers(model, EIGHT) == {f"model.{name}": REASON}
    # the number of experts may stand in a config inside of the config
    assert list(routers(model, Config(text_config=EIGHT))) == [f"model.{name}"]


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_are_none_and_wide_gates_neither(name):
    assert routers(nest(name, nn.Linear(*OTHERS[name])), EIGHT) == {}


def test_a_gate_beside_an_up_projection_of_its_shape_is_that_of_an_mlp():
    mlp = nn.ModuleDict({"gate": nn.Linear(64, 8), "up": nn.Linear(64, 8), "down": nn.Linear(8, 64)})
    assert routers(nn.ModuleDict({"mlp": mlp}), EIGHT) == {}


def test_the_number_of_experts_is_seen_in_the_model_where_no_config_tells():
    block = nn.ModuleDict({"gate": nn.Linear(64, 8), "experts": experts(8)})
    assert list(routers(nn.ModuleDict({"moe": block}))) == ["moe.gate"]
    few = nn.ModuleDict({"gate": nn.Linear(64, 16), "experts": experts(8)})
    assert routers(few) == {}
    alone = nn.ModuleDict({"gate": nn.Linear(64, 8)})
    assert routers(alone) == {}
    alone.n_routed_experts = 8
    assert list(routers(alone)) == ["gate"]
    raw = nn.ModuleDict({"router": nn.Linear(64, 8), "experts": nn.Module()})
    raw["experts"].w = nn.Parameter(torch.zeros(8, 4, 64))
    assert list(routers(raw)) == ["router"]
    own = nn.ModuleDict({"router": nn.Linear(64, 8)})
    own.register_parameter("experts_up", nn.Parameter(torch.zeros(8, 4, 64)))
    assert list(routers(own)) == ["router"]


def test_where_nothing_tells_of_experts_a_name_is_not_enough():
    assert routers(nn.ModuleDict({"router": nn.Linear(64, 8), "gate": nn.Linear(64, 8)})) == {}
    # a shared expert has one gate
    assert list(routers(nn.ModuleDict({"shared_expert_gate": nn.Linear(64, 1)}))) == ["shared_expert_gate"]


def test_all_of_a_router_network_stays_float():
    net = nn.ModuleDict({"router": nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8))})
    assert list(routers(net, EIGHT)) == ["router.0", "router.2"]


def moe():
    block = nn.ModuleDict({"gate": nn.Linear(64, 8), "experts": experts(8), "shared_expert_gate": nn.Linear(64, 1)})
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": block})])})


GATES = {"layers.0.mlp.gate", "layers.0.mlp.shared_expert_gate"}


def floats(model):
    return {name for name, module in model.named_modules() if type(module) is nn.Linear}


def test_quantize_leaves_routers_in_float_and_report_says_why():
    model = quantize(moe(), "int4")
    assert floats(model) == GATES
    rows = {row.name: row.reason for row in report(model).rows}
    assert rows["layers.0.mlp.gate.weight"] == REASON


def test_they_are_quantized_where_a_pattern_names_them():
    for kwargs in ({"overrides": {"gate": {"weights": "int8"}}}, {"overrides": {"mlp.gate": {"group_size": 32}}}):
        assert floats(quantize(moe(), "int4", **kwargs)) == GATES - {"layers.0.mlp.gate"}
    assert floats(quantize(moe(), "int4", include=["*gate", "experts"])) == set()
    model = quantize(moe(), "int4", overrides={"gate": {"weights": "int8"}})
    assert isinstance(model["layers"][0]["mlp"]["gate"], QLinear)


@pytest.mark.parametrize("pattern", ["mlp", "layers", "*", "layers.0", "*.mlp"])
def test_a_pattern_that_names_what_they_are_in_does_not_ask_for_them(pattern):
    assert floats(quantize(moe(), "int4", include=pattern)) == GATES
    assert floats(quantize(moe(), "int4", overrides={pattern: {"weights": "int8"}})) == GATES


def test_an_override_to_float_does_not_ask_for_them():
    assert floats(quantize(moe(), "int4", overrides={"gate": {"weights": None}})) == GATES
