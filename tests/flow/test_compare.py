"""compare: errors against what is computed by hand, calls that hurt, and models left as they were."""

import copy
import json
import math

import pytest
import tiny_models
import torch
from torch import nn

from quanto_hf import compare, dequantize, freeze, quantize
from quanto_hf.flow.saturation import clipped, weight_errors
from quanto_hf.nn import QLinear
from quanto_hf.nn.qweight import QuantizedWeight
from quanto_hf.ops import unpack

X = torch.randn(24, 64, generator=torch.Generator().manual_seed(5))


class Net(nn.Module):
    """An activation that works in place, and a result that is nested."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.drop = nn.Linear(64, 96), nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.tail = nn.Sequential(nn.Linear(96, 32), nn.Linear(32, 5))

    def forward(self, x, scale=1.0):
        return {"out": (self.tail(self.drop(self.act(self.first(x)))) * scale, None), "step": torch.tensor(3)}


def pair(net=None, frozen=True, **kwargs):
    net = net or Net()
    other = quantize(copy.deepcopy(net), **{"weights": "int4", **kwargs})
    return net, freeze(other) if frozen else other


def by_name(comparison):
    return {row.name: row for row in comparison.rows}


@torch.no_grad()
def test_own_and_accumulated_errors_are_those_computed_by_hand():
    net, other = pair()
    hidden, wanted = net.first(X).relu(), net.tail[0](net.first(X).relu())
    own, running = other.tail[0](hidden), other.tail[0](other.first(X).relu())
    row = by_name(compare(net, other, X))["tail.0"]
    assert row.own.relative == pytest.approx(tiny_models.relative(own, wanted), rel=1e-6)
    assert row.accumulated.relative == pytest.approx(tiny_models.relative(running, wanted), rel=1e-6)
    assert row.accumulated.largest == pytest.approx(float((running - wanted).abs().max()), rel=1e-6)
    assert row.accumulated.relative > row.own.relative


def test_rows_are_the_quantized_layers_in_the_order_of_the_model_and_parents_on_request():
    net, other = pair(exclude="tail.1")
    assert [row.name for row in compare(net, other, X).rows] == ["first", "tail.0"]
    comparison = compare(net, other, X, parents=True)
    assert [row.name for row in comparison.rows] == ["", "first", "tail", "tail.0"]
    rows = by_name(comparison)
    # the last layer is float: what comes out of the model is what comes out of tail
    assert rows[""].own is None and rows[""].accumulated == rows["tail"].accumulated
    assert rows["tail"].stored == "Sequential" and rows["first"].stored == "int4 g64 asym"


@pytest.mark.parametrize("keep_bytes", [0, 24 * 96 * 4, 24 * (96 + 32) * 4, 1 << 30])
def test_a_limit_of_memory_costs_passes_and_changes_nothing(keep_bytes):
    net, other = pair()
    calls, wanted = [], compare(net, other, X, parents=True).to_dict()
    other.register_forward_hook(lambda *_: calls.append(1))
    assert compare(net, other, X, parents=True, keep_bytes=keep_bytes).to_dict() == wanted
    # 5 modules: alone; the first, then the rest together; ...
    assert len(calls) == {0: 5, 24 * 96 * 4: 2, 24 * 128 * 4: 2, 1 << 30: 1}[keep_bytes]


def test_batches_are_summed_and_may_be_tensors_tuples_dicts_or_a_generator():
    net, other = pair()
    whole = compare(net, other, X).to_dict()["layers"]
    parts = [X[:1], (X[1:9],), {"x": X[9:], "scale": 1.0}, X[:0]]
    for data in (parts, (part for part in parts)):
        apart = compare(net, other, data, keep_bytes=0).to_dict()["layers"]
        for one, wanted in zip(apart, whole, strict=True):
            numbers = [key for key, value in wanted.items() if isinstance(value, float)]
            assert len(numbers) == 10
            assert [one[key] for key in numbers] == pytest.approx([wanted[key] for key in numbers], rel=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_models_are_left_as_they_were(frozen):
    net, other = pair(frozen=frozen, activations="int8")
    net.train(), other.train()
    other.tail.eval()
    other.register_buffer("seen", torch.zeros(1))
    other.register_buffer("grown", torch.zeros(0))
    other.register_forward_hook(lambda module, *_: (module.seen.add_(1), module.grown.resize_(2)) and None)
    seen, before = other.seen, copy.deepcopy(other.state_dict())
    hooks = [len(module._forward_hooks) for model in (net, other) for module in model.modules()]
    compare(net, other, X, parents=True)
    assert net.training and net.drop.training and other.training and not other.tail.training
    assert other.seen is seen and float(seen) == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())
    assert [len(module._forward_hooks) for model in (net, other) for module in model.modules()] == hooks


def test_a_static_scale_can_be_changed_in_place_after_a_comparison():
    net, other = pair(nn.Sequential(nn.Linear(64, 8)), activations="int8")
    other[0].make_static(0.05)
    compare(net, other, X)
    fresh = copy.deepcopy(other)
    for model in (other, fresh):
        model[0].input_scale.fill_(0.01)
    assert torch.equal(other(X), fresh(X)) and clipped(other[0], X).any()


def test_models_are_left_as_they_were_when_the_forward_pass_fails():
    net, other = pair()
    net.train(), other.train()
    with pytest.raises(RuntimeError):
        compare(net, other, torch.randn(2, 63))
    assert net.training and other.training
    assert not any(module._forward_hooks for model in (net, other) for module in model.modules())


def test_a_prepared_model_has_the_errors_of_the_frozen_one():
    net, prepared = pair(frozen=False, activations="int8")
    frozen = freeze(copy.deepcopy(prepared))
    for one, other in zip(compare(net, prepared, X).rows, compare(net, frozen, X).rows, strict=True):
        assert one.own.relative == pytest.approx(other.own.relative, rel=1e-5)
        assert (one.weight, one.ends) == pytest.approx((other.weight, other.ends))


# the codes of the smallest and the largest number; of float8 the bits of -448 and 448
ENDS = {"int8": [-127, 127], "int4": [0, 15], "int2": [0, 3], "float8": [0xFE, 0x7E], "nf4": [0, 15], "fp4": [7, 15]}


@pytest.mark.parametrize("weights", ENDS)
def test_the_error_of_the_weight_and_the_codes_at_the_ends(weights):
    net, other = pair(weights=weights)
    row = by_name(compare(net, other, X))["first"]
    exact, layer = net.first.weight.detach(), other.first
    assert row.weight == pytest.approx(tiny_models.relative(layer.weight.dequantize(), exact), rel=1e-4)
    codes = unpack(layer.weight_packed, {"4": 4, "2": 2}.get(weights[-1], 8), 64)
    assert row.ends == pytest.approx(float(torch.isin(codes, torch.tensor(ENDS[weights])).float().mean())) and row.ends


def test_codes_at_the_ends_are_counted_in_asymmetric_and_symmetric_grids():
    weight = torch.linspace(-1, 1, 64).repeat(2, 1)
    for symmetric in (True, False):
        layer = nn.Sequential(nn.Linear(64, 2))
        layer[0].weight.data.copy_(weight)
        source = copy.deepcopy(layer[0])
        quantize(layer, weights="int4", group_size=64, symmetric=symmetric, optimizer="minmax")
        made = layer[0].scheme.dequantize(layer[0].quantized(), 64, torch.float32)
        at_ends = (made == made.amin(1, keepdim=True)) | (made == made.amax(1, keepdim=True))
        ends = weight_errors(layer[0], source)[1]
        # the code -8 of the symmetric grid may be used by no weight at all
        assert 0 < ends <= float(at_ends.float().mean()) + 1e-6
    assert ends == pytest.approx(float(at_ends.float().mean()))


def test_what_a_static_scale_clips_and_a_dynamic_one_does_not():
    layer = quantize(nn.Sequential(nn.Linear(4, 4)), weights="int8", activations="int8")[0]
    x = torch.tensor([[127.0, 127.4, 127.6, -128.0]])
    assert not clipped(layer, x).any()
    layer.make_static(1.0)
    assert clipped(layer, x).tolist() == [[False, False, True, True]]
    assert clipped(nn.Linear(4, 4), x) is None
    net, other = pair(nn.Sequential(nn.Linear(64, 8)), activations="int8")
    other[0].make_static(float(X.abs().max()) / 127 / 2)
    half = float((X.abs() / (X.abs().max() / 127 / 2) > 127.5).float().mean())
    assert compare(net, other, X).rows[0].clipping.value == pytest.approx(half) and half > 0.01
    assert compare(*pair(), X).rows[0].clipping.value is None


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "whisper"])
def test_transformers_models(name):
    model = tiny_models.build(name)
    model, other = pair(model, weights="int8")
    rows = compare(model, other, tiny_models.TINY[name].inputs(), parents=True).rows
    layers = [row for row in rows if row.own is not None]
    assert [row.name for row in layers] == [n for n, m in other.named_modules() if isinstance(m, QuantizedWeight)]
    assert rows[0].name == ""
    assert all(row.own.sqnr > 38 and row.accumulated.sqnr > 25 and not row.note for row in layers)
    assert rows[0].accumulated.sqnr > 25


class Routed(nn.Module):
    """Two experts, one of which gets the rows with a positive score; one layer that is called twice, one never."""

    def __init__(self):
        super().__init__()
        self.router, self.a, self.b = nn.Linear(64, 1), nn.Linear(64, 64), nn.Linear(64, 64)
        self.twice, self.never = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        chosen = self.router(x)[:, 0] > 0
        out = torch.zeros_like(x)
        out[chosen], out[~chosen] = self.a(x[chosen]), self.b(x[~chosen])
        return self.twice(self.twice(out))


def test_layers_that_are_called_otherwise_have_their_own_error_and_a_note():
    net = Routed()
    other = quantize(copy.deepcopy(net), weights="int8")
    # the quantized router decides otherwise for many rows
    other.router.bias = nn.Parameter(other.router.bias + 0.5)
    rows = by_name(compare(net, freeze(other), [X, X]))
    for name in ("a", "b"):
        assert rows[name].own.sqnr > 38 and rows[name].accumulated.count == 0 and "own error only" in rows[name].note
    assert rows["twice"].own.count == rows["twice"].accumulated.count == 2 * 2 * X.numel()
    assert rows["never"].note == "it was not called" and rows["never"].weight < 0.01
    assert "router" in [row.name for row in compare(net, other, X).worst(1, by="accumulated")]


def test_the_layer_that_hurts_is_the_worst():
    net, other = pair(weights="int8", overrides={"tail.0": {"weights": "int2"}})
    comparison = compare(net, other, X)
    assert comparison.worst(1)[0].name == "tail.0"
    assert [row.own.sqnr for row in comparison.worst(9)] == sorted(row.own.sqnr for row in comparison.rows)
    with pytest.raises(ValueError, match="'mean' is not a measure; choose 'own' or 'accumulated'"):
        comparison.worst(by="mean")


def test_nan_is_the_worst_and_is_none_in_json():
    net, other = pair()
    with torch.no_grad():
        other.tail[0].bias[0] = math.nan
    comparison = compare(net, other, X)
    assert comparison.worst(1)[0].name == "tail.0"
    data = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert data["layers"][1]["own_sqnr"] is None and data["layers"][0]["own_sqnr"] > 10


def test_the_table_has_a_line_for_each_row():
    net, other = pair(activations="int8")
    lines = str(compare(net, other, X, parents=True)).splitlines()
    assert len(lines) == 2 + 5 and lines[2].startswith("(the model)  Net")
    assert lines[3].split()[:4] == ["first", "int4", "g64", "asym"] and lines[3].endswith("0.00%")


def test_named_layers_of_two_float_models():
    net, other = pair(weights="int8")
    comparison = compare(net, dequantize(other), X, layers=["first", "tail"])
    assert [row.name for row in comparison.rows] == ["first", "tail.0", "tail.1"]
    assert all(30 < row.own.sqnr < 60 and row.stored == "Linear" and 0 < row.weight < 0.01 for row in comparison.rows)


def test_a_model_that_is_one_layer():
    source = nn.Linear(64, 8)
    layer = freeze(quantize(nn.Sequential(copy.deepcopy(source)), weights="int8"))[0]
    (row,) = compare(source, layer, X).rows
    assert isinstance(layer, QLinear) and row.name == "" and row.own.relative == row.accumulated.relative > 0


def test_what_cannot_be_compared():
    net, other = pair()
    with pytest.raises(ValueError, match="nothing to compare"):
        compare(net, copy.deepcopy(net), X)
    with pytest.raises(ValueError, match="the same object"):
        compare(net, net, X)
    with pytest.raises(ValueError, match="did you mean 'first'"):
        compare(net, other, X, layers="frist")
    with pytest.raises(TypeError, match="a batch is a tensor, a tuple or a dict"):
        compare(net, other, 3)


def test_weights_that_are_offloaded_have_the_error_from_when_they_were_quantized(tmp_path):
    from accelerate import cpu_offload

    net, other = pair(tiny_models.build("llama"), weights="int8")
    inputs = tiny_models.TINY["llama"].inputs()
    wanted = compare(net, other, inputs).to_dict()["layers"]
    cpu_offload(other, torch.device("cpu"))
    for row, before in zip(compare(net, other, inputs).to_dict()["layers"], wanted, strict=True):
        assert row["own_sqnr"] == before["own_sqnr"] and row["accumulated_sqnr"] == before["accumulated_sqnr"]
        assert row["weight"] == pytest.approx(before["weight"], rel=0.05)
