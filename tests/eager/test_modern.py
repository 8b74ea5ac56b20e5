"""C17: what torch's eager mode cannot do: safetensors, torch.compile, bfloat16, gradients, and no warnings."""

import ast
import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from eager_models import ConvNet, error, images, run, warmed
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import quanto_hf
from quanto_hf import eager
from quanto_hf.eager import (
    convert,
    fuse_modules,
    get_default_qconfig,
    modules,
    prepare,
    quantize,
    quantize_dynamic,
)

pytestmark = pytest.mark.filterwarnings("error")


class Recurrent(nn.Module):
    """An embedding, an LSTM, a GRU and a linear layer."""

    def __init__(self):
        super().__init__()
        self.table, self.lstm, self.gru = nn.Embedding(20, 8), nn.LSTM(8, 8, bidirectional=True), nn.GRU(16, 8)
        self.fc = nn.Linear(8, 4)

    def forward(self, index):
        return self.fc(self.gru(self.lstm(self.table(index))[0])[0])


def static_net():
    net = fuse_modules(warmed(ConvNet(eager)), ConvNet.fusible)
    net.qconfig = get_default_qconfig("onednn")
    return quantize(net, run, [images()]), images()


def recurrent(dtype="qint8"):
    model = quantize_dynamic(Recurrent().eval(), dtype=dtype)
    return quantize_dynamic(model, dtype="quint8"), torch.randint(20, (5, 3))


def lstm():
    model = eager.QuantWrapper(nn.LSTM(4, 8)).eval()
    model.dequant = nn.Identity()
    model.qconfig = get_default_qconfig("onednn")
    made = quantize(model, run, [torch.randn(2, 2, 4)])

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.made = made

        def forward(self, x):
            return self.made(x)[0]

    return First(), torch.randn(2, 2, 4)


MODELS = {
    "static": static_net,
    "dynamic": recurrent,
    "float16": lambda: recurrent("float16"),
    "lstm": lstm,
    "linear": lambda: (quantize_dynamic(nn.Sequential(nn.Linear(8, 4))), torch.randn(3, 8)),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


@every_model
def test_c17_the_state_dict_is_tensors_and_survives_safetensors(make, tmp_path):
    model, x = make()
    state = model.state_dict()
    assert all(isinstance(value, torch.Tensor) and not value.is_quantized for value in state.values())
    save_file(state, tmp_path / "model.safetensors")
    fresh = make()[0]
    for tensor in (*fresh.parameters(), *fresh.buffers()):
        tensor.data.zero_()
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(fresh(x), model(x))


def test_c17_a_skeleton_on_meta_takes_a_saved_state():
    model, x = static_net()
    with torch.device("meta"):
        fresh = fuse_modules(ConvNet(eager).eval(), ConvNet.fusible)
    fresh.qconfig = get_default_qconfig("onednn")
    fresh = convert(prepare(fresh))
    assert {tensor.device.type for tensor in fresh.state_dict().values()} == {"meta"}
    fresh.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("make", [static_net, recurrent, lstm])
def test_c17_one_graph_for_torch_compile(make):
    model, x = make()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(compiled, model(x), atol=1e-5, rtol=1e-4)


@every_model
def test_c17_a_model_in_bfloat16_keeps_its_scales(make):
    model, x = make()
    exact = model(x)
    kept = {key for key, value in model.state_dict().items() if key.endswith(("_scale", ".scale", "_zero", "_half"))}
    half = copy.deepcopy(model).bfloat16()
    state = half.state_dict()
    assert kept and all(torch.equal(state[key], model.state_dict()[key]) for key in kept)
    out = half(x.bfloat16() if x.is_floating_point() else x)
    assert out.dtype == torch.bfloat16 and error(out.float(), exact) < 0.05


def test_c17_bfloat16_inputs_of_a_float32_model():
    for make in (static_net, MODELS["linear"]):
        model, x = make()
        out = model(x.bfloat16())
        assert out.dtype == torch.bfloat16 and error(out.float(), model(x)) < 0.05
    cell = quantize_dynamic(nn.LSTMCell(4, 4))
    assert cell(torch.randn(2, 4).bfloat16())[0].dtype == torch.bfloat16
    layer = quantize_dynamic(nn.LSTM(4, 4))
    assert layer(torch.randn(2, 1, 4).bfloat16())[0].dtype == torch.bfloat16


@pytest.mark.parametrize("make", [static_net, lstm, MODELS["linear"]], ids=["static", "lstm", "linear"])
def test_c17_gradients_reach_the_input(make):
    model, x = make()
    x.requires_grad_()
    model(x).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_c17_gradients_go_through_recurrent_layers(kind):
    layer = kind(4, 4)
    x = torch.randn(*((3, 2) if kind in (nn.LSTM, nn.GRU) else (2,)), 4)
    grads = []
    for module in (layer, quantize_dynamic(layer)):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        grads.append(leaf.grad)
    assert error(grads[1], grads[0]) < 0.05


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm], ids=["weight-norm", "spectral-norm"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "qat"])
def test_c17_parametrized_modules(norm, kind):
    layer = nn.Linear(6, 5)
    model, x = nn.Sequential(norm(layer)).eval(), torch.randn(8, 6)
    if kind == "dynamic":
        made = quantize_dynamic(model)
    elif kind == "static":
        model.qconfig = get_default_qconfig("onednn")
        made = quantize(model, run, [x])
    else:
        model.train().qconfig = eager.get_default_qat_qconfig("onednn")
        made = eager.quantize_qat(model, lambda model: model(x), [])
        model.eval()
    assert isinstance(made[0], modules.Linear) and error(made(x), model(x)) < 0.02
    assert not hasattr(made[0], "parametrizations")


def test_c17_the_older_weight_norm_which_is_a_hook():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, x = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 5))).eval(), torch.randn(8, 6)
    with torch.no_grad():
        model(x)
        model[0].weight_g.mul_(3)
    made = quantize_dynamic(model)
    assert error(made(x), model(x)) < 0.02 and not made[0]._forward_pre_hooks


@every_model
def test_c17_models_are_copied_and_pickled(make):
    model, x = make()
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    if make is not lstm:
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_c17_no_gradient_and_no_training_of_what_is_quantized():
    for make in MODELS.values():
        model = make()[0]
        quantized = [p for name, p in model.named_parameters() if "_packed" in name or "_scale" in name]
        assert quantized and not any(parameter.requires_grad for parameter in quantized)


def test_c17_a_weight_cannot_be_written():
    for module in (static_net()[0].conv, quantize_dynamic(nn.Linear(4, 4), dtype="float16")):
        assert module.weight.is_floating_point()
        with pytest.raises((RuntimeError, AttributeError, TypeError)):
            module.weight = nn.Parameter(torch.zeros(4, 4))


def test_c17_all_works_where_torch_has_no_quantized_dtypes(monkeypatch):
    for name in ("qint8", "quint8", "qint32", "quint4x2", "quint2x4"):
        monkeypatch.delattr(torch, name, raising=False)
    for name in ("per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric"):
        monkeypatch.delattr(torch, name, raising=False)
    net, x = static_net()
    assert net(x).shape == (16, 10)
    for dtype in ("qint8", "float16", "quint8", "quint4x2"):
        quantize_dynamic(Recurrent(), dtype=dtype)


FORBIDDEN = {
    "qint8",
    "quint8",
    "qint32",
    "quint4x2",
    "quint2x4",
    "quantize_per_tensor",
    "quantize_per_channel",
    "qscheme",
}


@pytest.mark.parametrize("room", ["nn", "eager"])
def test_c17_no_quantized_dtype_of_torch_is_named(room):
    found = []
    for file in Path(quanto_hf.__file__).parent.joinpath(room).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute):
                continue
            dotted = ast.unparse(node)
            if dotted.startswith("torch.ops.quantized") or (
                dotted.startswith("torch.") and dotted.count(".") == 1 and node.attr in FORBIDDEN
            ):
                found.append(f"{file.name}:{node.lineno} {dotted}")
    assert found == []
