"""Row C18: torch.ao's numeric suite by name, with its keys, beside torch.ao itself while torch has it."""

import copy
import warnings

import pytest
import tiny_models
import torch
from torch import nn
from torch_eager import torch_quantization

from quanto_hf import freeze, quantize
from quanto_hf.eager import numeric_suite as suite
from quanto_hf.eager import quantize_dynamic
from quanto_hf.eager.loggers import Logger

SWAP = {nn.Linear, nn.Conv2d}


class Net(nn.Module):
    """Convolutions and linear layers, some of them nested, a norm that stays float, and what works in place."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.norm = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.GroupNorm(2, 4)
        self.block = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Sigmoid(), nn.Dropout(), nn.Linear(8, 5))

    def forward(self, x):
        return self.block(self.norm(self.relu(self.conv(x))))


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(4))


def pair(net=None, **kwargs):
    net = (net or Net()).eval()
    return net, freeze(quantize(copy.deepcopy(net), **{"weights": "int8", **kwargs}))


def torch_pair(ao, net, static):
    """(float model, model that torch has quantized); a static one has its stubs in both."""
    if not static:
        return copy.deepcopy(net), ao.quantize_dynamic(net)
    wrapped = ao.QuantWrapper(copy.deepcopy(net))
    prepared = copy.deepcopy(wrapped)
    prepared.qconfig = ao.get_default_qconfig("x86")
    prepared = ao.prepare(prepared)
    prepared(X)
    return wrapped, ao.convert(prepared)


@pytest.fixture
def torch_suite():
    """torch's numeric suite, without its warnings; the test is skipped where torch has no longer got it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_quantization()
        yield pytest.importorskip("torch.ao.ns._numeric_suite")


@pytest.mark.parametrize("static", [True, False])
def test_the_keys_are_those_of_torch(torch_suite, static):
    net, other = pair()
    prefix = "module." if static else ""
    theirs = torch_pair(torch_quantization(), net, static)
    found = torch_suite.compare_weights(theirs[0].state_dict(), theirs[1].state_dict())
    ours = suite.compare_weights(net.state_dict(), other.state_dict())
    assert [prefix + key for key in ours] == list(found)
    for key, made in ours.items():
        assert torch.equal(made["float"], found[prefix + key]["float"])
    outputs = torch_suite.compare_model_outputs(copy.deepcopy(theirs[0]), copy.deepcopy(theirs[1]), X)
    assert [prefix + key for key in suite.compare_model_outputs(net, other, X)] == [
        key for key in outputs if key.startswith(prefix)
    ]
    swap = SWAP if static else {nn.Linear}
    stubs = torch_suite.compare_model_stub(*theirs, swap, X)
    assert [prefix + key for key in suite.compare_model_stub(net, other, swap, X)] == list(stubs)


def test_the_float_side_has_the_numbers_of_torch(torch_suite):
    net, other = pair()
    theirs = torch_pair(torch_quantization(), net, static=False)
    outputs = torch_suite.compare_model_outputs(*copy.deepcopy(theirs), X)
    for key, stats in suite.compare_model_outputs(net, other, X).items():
        # the in-place relu behind it has written into what torch logged
        if key != "conv.stats":
            torch.testing.assert_close(stats["float"], outputs[key]["float"])
    stubs = torch_suite.compare_model_stub(*theirs, {nn.Linear}, X)
    for key, stats in suite.compare_model_stub(net, other, {nn.Linear}, X).items():
        # torch logs the first item of a batch only
        assert tiny_models.relative(stats["float"][0][0], stubs[key]["float"][0]) < 0.05


@pytest.mark.parametrize("weights", ["int8", "int4", "int2"])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_weights_from_state_dicts_are_what_the_layers_multiply_with(weights, kind):
    net = nn.Sequential(kind(6, 6, 3), kind(6, 70, 1, bias=False), nn.Flatten(), nn.Linear(70, 130), nn.Linear(130, 1))
    net, other = pair(net, weights=weights)
    found = suite.compare_weights(net.state_dict(), other.state_dict())
    linear = "._packed_params._packed_params"
    assert list(found) == ["0.weight", "1.weight", "3" + linear, "4" + linear]
    for key, pair_ in found.items():
        layer = int(key[0])
        assert torch.equal(pair_["float"], net[layer].weight)
        assert torch.equal(pair_["quantized"], other[layer].weight.dequantize())
        # users of torch.ao call it
        assert torch.equal(pair_["quantized"].dequantize(), pair_["quantized"])
    given = suite.compare_weights(net.state_dict(), other)
    assert all(torch.equal(given[key]["quantized"], found[key]["quantized"]) for key in found)


@pytest.mark.parametrize("weights", ["float8", "nf4", "fp4"])
def test_what_a_state_dict_does_not_say_the_model_does(weights):
    net, other = pair(nn.Sequential(nn.Linear(64, 8)), weights=weights)
    with pytest.raises(ValueError, match=r"0\.weight_packed does not say what type of number it holds"):
        suite.compare_weights(net.state_dict(), other.state_dict())
    (found,) = suite.compare_weights(net.state_dict(), other).values()
    assert torch.equal(found["quantized"], other[0].weight.dequantize())


def test_the_weight_of_a_fused_module_and_of_a_bare_layer_is_found():
    layer, other = pair(nn.Sequential(nn.Linear(64, 8)))
    fused = {"fc.0.weight": layer[0].weight.detach()}
    state = {name.replace("0.", "fc."): tensor for name, tensor in other.state_dict().items()}
    assert list(suite.compare_weights(fused, state)) == ["fc._packed_params._packed_params"]
    assert list(suite.compare_weights(layer[0].state_dict(), other[0].state_dict())) == [
        "_packed_params._packed_params"
    ]
    assert suite.compare_weights({}, other.state_dict()) == {}


@torch.no_grad()
def test_outputs_are_those_of_the_running_models_and_the_models_are_left_as_they_were():
    net, other = pair()
    before = [(list(model.state_dict()), [name for name, _ in model.named_modules()]) for model in (net, other)]
    wanted = (net(X), other(X))
    found = suite.compare_model_outputs(net, other, X)
    assert torch.equal(found["block.4.stats"]["float"][0], wanted[0])
    assert torch.equal(found["block.4.stats"]["quantized"][0], wanted[1])
    # not what the in-place relu has made of it
    assert torch.equal(found["conv.stats"]["float"][0], net.conv(X))
    assert [(list(m.state_dict()), [name for name, _ in m.named_modules()]) for m in (net, other)] == before
    assert not any(module._forward_hooks for model in (net, other) for module in model.modules())


@torch.no_grad()
def test_stubs_see_the_input_of_the_quantized_model_and_are_taken_out_again():
    net, other = pair(weights="int4")
    found = suite.compare_model_stub(net, other, SWAP, X)
    hidden = other.block[:4](other.norm(other.relu(other.conv(X))))
    assert torch.equal(found["block.4.stats"]["float"][0], net.block[4](hidden))
    assert torch.equal(found["block.4.stats"]["quantized"][0], other.block[4](hidden))
    assert found["block.4.stats"]["float"][0].shape == (2, 5)
    assert not any(isinstance(module, suite.Shadow) for module in other.modules())
    with pytest.raises(RuntimeError):
        suite.compare_model_stub(net, other, SWAP, X[:, :1])
    assert not any(isinstance(module, suite.Shadow) for module in other.modules())
    assert list(suite.compare_model_stub(net, other, {nn.Sequential}, X)) == ["block.stats"]


def test_step_by_step_several_batches_are_logged():
    net, other = pair()
    suite.prepare_model_outputs(net, other, allow_list={nn.Linear})
    for batch in (X, X[:1]):
        net(batch), other(batch)
    found = suite.get_matching_activations(net, other)
    assert list(found) == ["block.1.stats", "block.4.stats"]
    assert [tensor.shape for tensor in found["block.4.stats"]["quantized"]] == [(2, 5), (1, 5)]
    assert list(suite.get_logger_dict(net, "model")) == ["model.block.1.stats", "model.block.4.stats"]
    net, other = pair()
    suite.prepare_model_with_stubs(net, other, SWAP)
    out = other(X)
    stats = suite.get_logger_dict(other)
    assert list(stats) == ["conv.stats", "block.1.stats", "block.4.stats"]
    assert torch.equal(stats["block.4.stats"]["quantized"][0], out)
    # what is asked of a shadow is answered by the quantized module
    assert other.block[4].in_features == 8


def test_loggers_of_ones_own():
    class Largest(Logger):
        def __init__(self):
            super().__init__()
            self.stats["largest"] = []

        def forward(self, x, y):
            self.stats["largest"].append(float((x - y).abs().max()))

    net, other = pair()
    found = suite.compare_model_stub(net, other, {nn.Linear}, X, logger_cls=Largest)
    assert 0 < found["block.1.stats"]["largest"][0] < 0.1


def test_functional_modules_are_shadowed_by_their_methods():
    class Functional(nn.Module):
        def add(self, x, y):
            return x + y

    class Rounded(Functional):
        def add(self, x, y):
            return (x + y).round()

    class Sum(nn.Module):
        def __init__(self, functional):
            super().__init__()
            self.functional = functional

        def forward(self, x):
            return self.functional.add(x, 0.25)

    found = suite.compare_model_stub(Sum(Functional()), Sum(Rounded()), {Functional}, torch.ones(2))
    assert found["functional.stats"]["float"][0].tolist() == [1.25, 1.25]
    assert found["functional.stats"]["quantized"][0].tolist() == [1, 1]


def test_transformers_models_are_called_with_keywords():
    net, other = pair(tiny_models.build("llama"))
    inputs = tiny_models.TINY["llama"].inputs()
    outputs = suite.compare_model_outputs(net, other, **inputs)
    stubs = suite.compare_model_stub(net, other, {nn.Linear}, **inputs)
    layers = [f"{name}.stats" for name in tiny_models.qlinears(other)]
    assert [key for key in outputs if key in layers] == layers == list(stubs)
    assert "model.embed_tokens.stats" in outputs
    for key in layers:
        assert tiny_models.relative(stubs[key]["quantized"][0], stubs[key]["float"][0]) < 0.02


def test_c18_weights_of_models_that_the_eager_mode_has_made():
    model = nn.ModuleDict({"fc": nn.Linear(6, 4), "table": nn.Embedding(9, 4), "lstm": nn.LSTM(4, 4)})
    for dtype, most in (("qint8", 0.02), ("float16", 1e-3), ("quint8", 0.02)):
        found = suite.compare_weights(model.state_dict(), quantize_dynamic(model, dtype=dtype))
        assert set(found) == {
            "fc.weight" if dtype == "quint8" else "fc._packed_params._packed_params", "table.weight",
            *(("lstm.weight_ih_l0", "lstm.weight_hh_l0") if dtype != "quint8" else ()),
        }  # fmt: skip
        for pair in found.values():
            assert torch.linalg.norm(pair["quantized"] - pair["float"]) <= most * torch.linalg.norm(pair["float"])
