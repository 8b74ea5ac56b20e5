"""quantize, freeze, requantize, dequantize and quantization_map on plain torch models."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import quanto_hf
from quanto_hf import dequantize, freeze, quantization_map, quantize, requantize
from quanto_hf.fit import Absmax
from quanto_hf.nn import QLinear
from quanto_hf.nn.slots import why_left
from quanto_hf.ops import scratch
from quanto_hf.ops.scratch import free
from quanto_hf.qtypes import QTYPES

TYPES = sorted(QTYPES)


def float_model():
    net = nn.Sequential(nn.Linear(96, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 32, bias=False))
    return net.eval()


def frozen(weights="int4", **kwargs):
    return freeze(quantize(float_model(), weights=weights, **kwargs))


@pytest.fixture
def x():
    return torch.randn(5, 96)


@pytest.mark.parametrize("weights", TYPES)
def test_freezing_does_not_change_what_the_model_answers(weights, x):
    model = quantize(float_model(), weights=weights)
    before = model(x)
    freeze(model)
    assert all(m.is_frozen for m in model.modules() if isinstance(m, QLinear))
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", TYPES)
def test_a_dequantized_model_is_plain_and_answers_the_same(weights, x):
    model = frozen(weights)
    before = model(x)
    dequantize(model)
    assert [type(m) for m in model] == [nn.Linear, nn.LayerNorm, nn.ReLU, nn.Linear]
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activations", [None, "int8", "float8"])
@pytest.mark.parametrize("weights", TYPES)
def test_requantize_restores_a_model_bit_for_bit(weights, activations, x):
    model = frozen(weights, activations=activations)
    with torch.device("meta"):
        empty = float_model()
    restored = requantize(empty, model.state_dict(), quantization_map(model))
    assert torch.equal(restored(x), model(x))
    trainable = {name for name, parameter in restored.named_parameters() if parameter.requires_grad}
    assert trainable == {"0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("0.weight_packed"), r"Missing key.*0\.weight_packed"),
        (lambda s: s.pop("3.weight_scale"), r"Missing key.*3\.weight_scale"),
        (lambda s: s.update({"3.weight_extra": torch.ones(1)}), r"Unexpected key.*3\.weight_extra"),
        (lambda s: s.update({"0.weight_zero": torch.ones(64, 3)}), r"size mismatch for 0\.weight_zero|0\.weight_zero"),
        (lambda s: s.update({"0.weight_packed": s["0.weight_packed"].float()}), r"dtype.*0\.weight_packed"),
    ],
    ids=["missing-packed", "missing-scale", "extra", "wrong-shape", "wrong-dtype"],
)
def test_requantize_names_each_tensor_that_does_not_fit(change, text):
    model = frozen("int4")
    state = dict(model.state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=f"(?s){text}"):
        requantize(float_model(), state, quantization_map(model))


def test_requantize_refuses_a_map_that_names_what_is_not_a_linear_layer():
    model = frozen("int8")
    entries = {**quantization_map(model), "1": {"scheme": model[0].scheme.to_dict()}}
    with pytest.raises(ValueError, match="names what this model has not, or what is not quantized: 1"):
        requantize(float_model(), model.state_dict(), entries)


def test_the_quantization_map_is_json_and_tells_the_group_size():
    entry = quantization_map(frozen("int4", group_size=32, activations="int8"))["0"]
    scheme = {"kind": "affine", "qtype": "int4", "group_size": 32, "symmetric": False}
    assert entry == {"scheme": scheme, "activations": "int8", "static": False}


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"weights": "int3"}, "'int3' is not a number type; choose one of float8"),
        ({"weights": "int4", "group_size": 7}, "group_size=7 does not work for int4 weights; choose -1, 16"),
        ({"weights": "int8", "symmetric": False}, "int8 weights are symmetric"),
        ({"activations": "int4"}, "activations='int4' is not supported; choose None, int8"),
        ({"overrides": {"3": {"weights": "int3"}}}, "3: 'int3' is not a number type"),
        ({"weights": "int8", "optimizer": "hqq"}, "fit='hqq' moves the zero, and symmetric int8 weights have none"),
        ({"weights": "int4", "optimizer": Absmax()}, "fit='absmax' has no zero; choose symmetric=True"),
        ({"weights": "int4", "optimizer": "best"}, "fit='best' is not known; choose one of absmax"),
        ({"weights": "int4", "optimizer": ["mse"]}, r"fit=\['mse'\] is not known; choose one of absmax"),
        ({"overrides": {"3": {"fit": "hqq"}}}, "3: fit='hqq' moves the zero"),
        ({"overrides": {"no*": {"fit": "hqq"}}}, r"overrides\['no\*'\]: fit='hqq' moves the zero"),
        ({"overrides": {"3": {"bits": 4}}}, r"overrides\['3'\]: 'bits' is not known; choose weights, group_size"),
        ({"overrides": {"3": "int4"}}, r"overrides\['3'\]='int4'; give a dict such as {'weights': 'int8'}"),
        ({"overrides": {"3": {"weights": ["int4"]}}}, r"3: \['int4'\] is not a number type"),
        ({"weights": "aqlm-1x20"}, "aqlm 1x20 g8 weights can be read, but not made: nbits=20 is out of range"),
        ({"weights": "aqlm-2x8", "optimizer": "mse"}, "fit='mse' is not for aqlm 2x8 g8 weights"),
        ({"weights": "aqlm-2x8", "learn_scales": True}, "aqlm 2x8 g8 weights have no scales that can be learned"),
        (
            {"overrides": {"3": {"weights": "aqlm-2x8"}}, "learn_scales": True},
            "3: aqlm 2x8 g8 weights have no scales that can be learned; leave out learn_scales, or choose int8",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(map(str, value.values())),
)
@pytest.mark.filterwarnings("ignore:the pattern")
def test_a_value_that_is_not_allowed_is_refused_and_nothing_is_changed(kwargs, text):
    model = float_model()
    modules = list(model)
    with pytest.raises(ValueError, match=text):
        quantize(model, **kwargs)
    assert list(model) == modules and not any(isinstance(m, QLinear) for m in model.modules())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_names_its_layer(bad):
    model = quantize(float_model(), weights="int8")
    with torch.no_grad():
        model[3].weight[1, 2] = bad
    with pytest.raises(ValueError, match=r"^3: .*NaN or infinite"):
        freeze(model)


@pytest.mark.parametrize("weights", ["int8", "int4", "nf4", "aqlm-2x4"])
def test_no_buffers_of_quantizing_are_held_afterwards(weights, monkeypatch):
    # in plain torch, as on a GPU
    monkeypatch.setenv("QUANTO_HF_REFERENCE", "1")
    free()
    model = quantize(float_model(), weights, learn_scales="aqlm" not in weights)
    assert not held()
    freeze(model)
    assert not held()
    dequantize(model)
    assert not held()
    with torch.no_grad():
        broken = float_model()
        broken[3].weight[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"^3: "):
        freeze(quantize(broken, weights))
    assert not held()


def held():
    """Names of the buffers of this thread."""
    return [name for name, *_ in scratch._local.__dict__.get("buffers", {})]


def test_an_output_head_stays_float_unless_it_is_included():
    net = nn.ModuleDict({"fc": nn.Linear(8, 8), "lm_head": nn.Linear(8, 8)})
    assert list(quantization_map(quantize(copy.deepcopy(net)))) == ["fc"]
    assert list(quantization_map(quantize(copy.deepcopy(net), include="*"))) == ["fc", "lm_head"]


def test_norms_stay_float_since_the_layer_that_reads_them_rounds_its_input():
    model = frozen("int8", activations="float8")
    assert type(model[1]) is nn.LayerNorm and model[3].activations.name == "float8_e4m3fn"


def test_the_optimizers_of_optimum_quanto_are_taken(x):
    for optimizer in (quanto_hf.MaxOptimizer(), quanto_hf.HqqOptimizer(), "mse"):
        assert torch.isfinite(frozen("int4", optimizer=optimizer)(x)).all()
    assert torch.isfinite(frozen("int8", optimizer=quanto_hf.AbsmaxOptimizer())(x)).all()


@pytest.mark.parametrize("weights", TYPES)
def test_a_frozen_model_is_a_normal_module(weights, x):
    model = frozen(weights)
    wanted = model(x)
    assert torch.equal(copy.deepcopy(model)(x), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), wanted)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert torch.equal(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)(x), wanted)
    model.share_memory()
    assert model[0].weight_packed.is_shared() and torch.equal(model(x), wanted)


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", TYPES)
def test_a_cast_converts_the_float_parts_and_keeps_the_stored_ones(weights, cast, x):
    model = frozen(weights)
    wanted, stored = model(x), {n: t.clone() for n, t in model.state_dict().items() if "weight_" in n}
    model.to(cast)
    assert all(
        torch.equal(model.state_dict()[n], t) and model.state_dict()[n].dtype == t.dtype for n, t in stored.items()
    )
    assert model[0].bias.dtype == model[0].weight.dtype == cast
    made = model(x.to(cast))
    assert made.dtype == cast
    # 8 and 11 bits of mantissa in two layers and a norm
    assert (made.float() - wanted).norm() / wanted.norm() < {torch.bfloat16: 2e-2, torch.float16: 3e-3}[cast]


@pytest.mark.parametrize("weights", TYPES)
def test_rows_of_zeros_stay_zeros_and_gradients_stay_finite(weights, x):
    model = float_model()
    with torch.no_grad():
        model[0].weight[3] = 0
        model[3].weight.zero_()
    freeze(quantize(model, weights=weights))
    assert not model[0].weight[3].any() and not model[3].weight.any()
    x.requires_grad_()
    model(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("weights", TYPES)
def test_quantization_aware_training_lowers_the_loss_and_ends_in_a_frozen_model(weights, x):
    model = quantize(float_model(), weights=weights)
    with torch.no_grad():
        # observing the model first must not change that it trains
        model(x)
    optimizer, target = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(5, 32)
    losses = []
    for _ in range(4):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]
    trained = model(x)
    freeze(model)
    torch.testing.assert_close(model(x), trained, rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "weight_" in n)


def test_static_scales_without_activations_are_refused():
    model = float_model()
    with pytest.raises(ValueError, match="static_activations=True without activations; add activations='int8'"):
        quantize(model, static_activations=True)
    assert not any(isinstance(m, QLinear) for m in model.modules())


def test_a_layer_whose_scales_cannot_be_learned_is_named_and_nothing_is_changed():
    model = float_model()
    with torch.no_grad():
        model[3].weight[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"^3: .*NaN or infinite"):
        quantize(model, "int4", learn_scales=True)
    assert not any(isinstance(m, QLinear) for m in model.modules())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_is_computed_from_other_parameters_stays_float(x):
    model = float_model()
    torch.nn.utils.prune.l1_unstructured(model[0], "weight", 100)
    torch.nn.utils.weight_norm(model[3])
    wanted = model(x)
    quantize(model)
    assert torch.equal(model(x), wanted) and not any(isinstance(m, QLinear) for m in model.modules())
    assert "computed from other parameters" in why_left(model[3], "weight")
