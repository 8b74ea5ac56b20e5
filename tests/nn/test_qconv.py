"""Quantized convolutions: the float ones with the rounded weight, in every state."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quanto_hf import dequantize, freeze, quantization_map, quantize, report, requantize
from quanto_hf.nn import State, qmodule_for
from quanto_hf.nn.activation import fake_quantize_input
from quanto_hf.qtypes import QTYPES, qint8, qtype
from quanto_hf.schemes import make_scheme

every_weight = pytest.mark.parametrize("weights", QTYPES)

# module, shape of a batch of inputs
CONVS = {
    "1d": (lambda: nn.Conv1d(6, 10, 3), (2, 6, 9)),
    "1d-same-dilated": (lambda: nn.Conv1d(6, 10, 3, padding="same", dilation=2), (2, 6, 9)),
    "1d-one-channel": (lambda: nn.Conv1d(1, 1, 1, bias=False), (1, 1, 1)),
    "2d": (lambda: nn.Conv2d(6, 10, 3), (2, 6, 9, 8)),
    "2d-strided-groups": (lambda: nn.Conv2d(6, 9, (3, 2), stride=2, groups=3, padding=1), (2, 6, 9, 8)),
    "2d-depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 9, 8)),
    "2d-reflect": (lambda: nn.Conv2d(6, 10, 3, padding=2, padding_mode="reflect"), (2, 6, 9, 8)),
    "2d-circular": (lambda: nn.Conv2d(6, 10, 3, padding=(1, 2), padding_mode="circular"), (2, 6, 9, 8)),
    "2d-replicate": (lambda: nn.Conv2d(6, 10, 3, padding=1, padding_mode="replicate"), (2, 6, 9, 8)),
    "3d": (lambda: nn.Conv3d(4, 6, (2, 3, 1)), (2, 4, 5, 6, 7)),
    "transpose-1d": (lambda: nn.ConvTranspose1d(6, 10, 3, stride=2), (2, 6, 9)),
    "transpose-2d-groups": (lambda: nn.ConvTranspose2d(6, 9, 3, stride=2, groups=3, output_padding=1), (2, 6, 5, 4)),
    "transpose-2d-dilated": (lambda: nn.ConvTranspose2d(6, 10, (3, 2), dilation=2, bias=False), (2, 6, 5, 4)),
    "transpose-3d": (lambda: nn.ConvTranspose3d(4, 6, 2, padding=1), (2, 4, 5, 6, 7)),
}
every_conv = pytest.mark.parametrize("make, shape", CONVS.values(), ids=CONVS)
# number type of inputs, and their static scale
INPUTS = {"weight-only": (None, None), "x-int8": ("int8", None), "x-int8-static": ("int8", 0.02)}
every_input = pytest.mark.parametrize("activations, scale", INPUTS.values(), ids=INPUTS)


def prepared(module: nn.Module, weights: str, activations: str | None = None, scale: float | None = None):
    layer = qmodule_for(module).from_module(module, make_scheme(weights), activations and qtype(activations))
    if scale is not None:
        layer.make_static(scale)
    return layer


def frozen(layer):
    copied = copy.deepcopy(layer)
    copied.freeze()
    return copied


@every_weight
@every_conv
def test_it_is_the_float_convolution_with_the_weight_that_it_shows(weights, make, shape):
    module, x = make(), torch.randn(shape)
    layer = frozen(prepared(module, weights))
    assert isinstance(layer, type(module)) and layer.weight_state is State.FROZEN
    assert layer.weight.shape == module.weight.shape and layer.weight_error < 0.5
    plain = layer.to_float()
    assert type(plain) is type(module) and torch.equal(plain.weight, layer.weight)
    assert torch.equal(layer(x), plain(x))
    # without a batch, and with none
    assert torch.allclose(layer(x[0]), plain(x[:1])[0], atol=1e-5)
    assert layer(x[:0]).shape == plain(x[:0]).shape


@every_conv
@every_input
@pytest.mark.parametrize("weights", ["int8", "int4", "int2"])
def test_a_prepared_one_gives_the_bits_of_the_frozen_one(weights, make, shape, activations, scale):
    for dtype in (torch.float32, torch.bfloat16):
        layer = prepared(make().to(dtype), weights, activations, scale)
        packed, x = frozen(layer), torch.randn(shape).to(dtype)
        with torch.no_grad():
            wanted = packed(x)
        assert torch.equal(layer(x), wanted) and torch.equal(packed(x), wanted)
        x.requires_grad_()
        assert torch.equal(layer(x), wanted) and torch.equal(packed(x), wanted)
        with torch.no_grad():
            assert torch.equal(layer(x), wanted)


@every_conv
@every_input
def test_gradients_pass_straight_through_both_roundings(make, shape, activations, scale):
    layer, x = prepared(make(), "int4", activations, scale), torch.randn(shape).mul(2).requires_grad_()
    made = layer(x)
    grad = torch.randn_like(made)
    made.backward(grad)
    plain, value = frozen(layer).to_float(), x.detach()
    if activations is not None:
        static = None if scale is None else torch.tensor([scale])
        value = fake_quantize_input(value.flatten(1), qint8, scale=static).view_as(value)
    value.requires_grad_()
    plain(value).backward(grad)
    inside = 1.0 if scale is None else (x.detach().abs() / scale <= 127).float()
    torch.testing.assert_close(x.grad, value.grad * inside, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-4)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad, rtol=1e-4, atol=1e-4)


def test_each_item_of_a_batch_has_its_own_scale():
    layer, x = frozen(prepared(nn.Conv2d(6, 10, 3), "int8", "int8")), torch.randn(3, 6, 9, 8)
    x *= torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1, 1)
    together = layer(x)
    assert all(torch.allclose(together[i], layer(x[i]), rtol=1e-4, atol=1e-6) for i in range(3))


@pytest.mark.parametrize("size", [None, (9, 8), (9, 9)])
def test_a_transposed_one_takes_an_output_size(size):
    layer, x = frozen(prepared(nn.ConvTranspose2d(6, 4, 2, stride=2), "int8")), torch.randn(2, 6, 4, 4)
    size = None if size is None else list(size)
    assert torch.equal(layer(x, output_size=size), layer.to_float()(x, output_size=size))


def test_a_row_that_is_stored_is_an_output_channel():
    module = nn.ConvTranspose1d(6, 10, 3)
    with torch.no_grad():
        # a channel of huge values must not cost the others their digits
        module.weight[:, 4] *= 1e4
    layer = frozen(prepared(module, "int8"))
    error = (layer.weight - module.weight).flatten(2).norm(dim=(0, 2)) / module.weight.flatten(2).norm(dim=(0, 2))
    assert layer.weight_scale.shape == (10, 1) and error.max() < 0.01


def test_autocast_computes_in_its_dtype():
    layer, x = prepared(nn.Conv2d(6, 10, 3), "int4", "int8"), torch.randn(2, 6, 9, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made, packed = layer(x), frozen(layer)(x)
        assert made.dtype == torch.bfloat16 and torch.equal(made, packed)


@every_conv
def test_on_meta_it_has_shapes(make, shape):
    layer = prepared(make(), "int4", "int8").to("meta")
    x = torch.empty(shape, device="meta")
    wanted = layer(x).shape
    layer.freeze()
    assert layer(x).shape == wanted and {p.device.type for p in layer.parameters()} == {"meta"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_it_is_a_normal_module(copied):
    layer, x = frozen(prepared(nn.Conv2d(6, 10, 3), "int4", "int8", 0.02)), torch.randn(2, 6, 9, 8)
    assert torch.equal(copied(layer)(x), layer(x))
    stored = layer.weight_packed.clone()
    layer.half()
    assert torch.equal(layer.weight_packed, stored) and layer.weight.dtype == layer.bias.dtype == torch.float16
    assert layer.input_scale.dtype == torch.float32 and layer(x.half()).dtype == torch.float16


@every_weight
def test_the_verbs_know_convolutions(weights):
    def net():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 4)
        )

    x = torch.randn(2, 3, 6, 6)
    model = freeze(quantize(net(), weights, activations="int8"))
    assert list(quantization_map(model)) == ["0", "2", "4"]
    restored = requantize(net(), model.state_dict(), quantization_map(model))
    assert torch.equal(restored(x), model(x))
    rows = {row.name: row for row in report(model).rows}
    assert rows["0.weight"].shape == (8, 3, 3, 3) and rows["0.weight"].stored == str(model[0].scheme)
    assert rows["2.weight"].error == model[2].weight_error and rows["0.bias"].reason == "biases stay float"
    plain = dequantize(copy.deepcopy(model))
    assert [type(m) for m in plain] == [type(m) for m in net()]
    wanted = F.conv2d(x, model[0].weight, model[0].bias)
    torch.testing.assert_close(plain[0](x), wanted)


def test_one_graph_under_torch_compile():
    torch._dynamo.reset()
    layer, x = frozen(prepared(nn.Conv2d(6, 10, 3), "int4", "int8", 0.02)), torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        made = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(made, layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("made", [lambda: nn.Conv2d(4, 6, 3), lambda: nn.ConvTranspose2d(4, 6, 3)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_an_input_of_integers_is_refused_and_not_multiplied_by_a_weight_of_zeros(made, dtype):
    for state in ("frozen", "prepared"):
        layer = qmodule_for(made()).from_module(made(), make_scheme("int8"))
        if state == "frozen":
            layer.freeze()
        with pytest.raises(ValueError, match=f"takes floating-point inputs, not {dtype}"):
            layer(torch.ones(1, 4, 5, 5, dtype=dtype))
