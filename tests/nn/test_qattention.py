"""torch's attention with quantized projections computes what it does with the dequantized weights, on every path."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from quanto_hf import calibrate, dequantize, freeze, quantize, report
from quanto_hf.nn import QLinear
from quanto_hf.nn.qattention import QAttentionOutput, QuantizedAttention

WIDTH = 64


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(**options):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, 4, **options).eval()
    for parameter in module.parameters():
        if parameter.dim() < 2:
            nn.init.normal_(parameter)
    return nn.ModuleDict({"a": module})


MASK = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
# how the module is made, and what it is given
CASES = {
    "self": ({}, {}),
    "batch first": ({"batch_first": True}, {}),
    "no bias": ({"bias": False}, {"need_weights": False}),
    "bias of keys": ({"add_bias_kv": True, "add_zero_attn": True}, {}),
    "keys of another size": ({"kdim": 48, "vdim": 32}, {"average_attn_weights": False}),
    "padding": ({"batch_first": True}, {"key_padding_mask": MASK}),
    "a causal mask": ({}, {"attn_mask": torch.ones(5, 5).triu(1).bool(), "need_weights": False, "is_causal": True}),
    "a mask in floats": ({"batch_first": True}, {"attn_mask": torch.zeros(5, 5), "key_padding_mask": MASK}),
}


def inputs(made, batch=2, length=5):
    first = made.get("batch_first", False)
    sizes = (WIDTH, made.get("kdim", WIDTH), made.get("vdim", WIDTH))
    shape = (batch, length) if first else (length, batch)
    if sizes == (WIDTH,) * 3:
        return (noise(*shape, WIDTH),) * 3
    return tuple(noise(*shape, size, seed=seed) for seed, size in enumerate(sizes))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("case", CASES)
def test_every_state_computes_with_the_rounded_weights(case, kind):
    made, given = CASES[case]
    model, args = attention(**made), inputs(made)
    plain = model["a"](*args, **given)
    quantize(model, kind)
    assert isinstance(model["a"], QuantizedAttention) and isinstance(model["a"], nn.MultiheadAttention)
    assert isinstance(model["a"].out_proj, QAttentionOutput) and isinstance(model["a"].out_proj, QLinear)
    found = [model["a"](*args, **given)]
    with torch.no_grad():
        found.append(model["a"](*args, **given))
    freeze(model)
    assert (report(model).packed.share == 1 and "in_proj_weight" not in model["a"]._parameters) or made.get("kdim")
    found.append(model["a"](*args, **given))
    with torch.no_grad():
        found.append(model["a"](*args, **given))
    dequantize(model)
    assert type(model["a"]) is nn.MultiheadAttention
    assert type(model["a"].out_proj) is NonDynamicallyQuantizableLinear
    with torch.no_grad():
        found.append(model["a"](*args, **given))
    for out, scores in found[1:]:
        torch.testing.assert_close(out, found[0][0], rtol=1e-5, atol=1e-5)
        assert (scores is None) == (given.get("need_weights") is False)
    error = float((found[0][0] - plain[0]).norm() / plain[0].norm())
    assert 0 < error < {"int8": 0.02, "int4": 0.25}[kind]


def test_one_item_gradients_and_training():
    model = attention()
    x = noise(5, WIDTH)
    quantize(model, "int8")
    model["a"](x, x, x)[0].sum().backward()
    assert model["a"].in_proj_weight.grad.abs().sum() > 0 and model["a"].out_proj.weight.grad.abs().sum() > 0
    freeze(model)
    x.requires_grad_()
    model["a"](x, x, x)[0].sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activations", [None, "int8"])
def test_an_encoder_layer_never_takes_the_fast_path_of_torch(norm_first, activations):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 128, batch_first=True, norm_first=norm_first)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2)).eval()
    x, calls = noise(2, 5, WIDTH), []
    quantize(model, "int4" if activations is None else "int8", activations=activations)
    for layer in model.modules():
        if isinstance(layer, QLinear) and not isinstance(layer, QAttentionOutput):
            # not a hook, which itself keeps torch off its fast path
            plain = type(layer).forward
            layer.forward = lambda x, layer=layer, plain=plain: (calls.append(layer), plain(layer, x))[1]
    outputs = []
    for state in (lambda net: net, freeze):
        state(model)
        for grad in (True, False):
            calls.clear()
            with torch.set_grad_enabled(grad):
                outputs.append(model[0](x, src_key_padding_mask=MASK))
            assert len(calls) == 4
    for made in outputs[1:]:
        torch.testing.assert_close(made, outputs[0], rtol=1e-4, atol=1e-4)


def test_reading_the_weight_is_reading_the_parameter():
    model = quantize(attention(), "int8")["a"]
    held = model._parameters["in_proj_weight"]
    assert model.in_proj_weight is held and model.get_parameter("in_proj_weight") is held
    with torch.no_grad():
        assert isinstance(model.in_proj_weight, nn.Parameter) and torch.equal(model.in_proj_weight, held)
        model.in_proj_weight.zero_()
    assert held.abs().sum() == 0
    freeze(model)
    assert model.in_proj_weight.shape == (3 * WIDTH, WIDTH) and (model.in_proj_weight + 1).sum() == 3 * WIDTH**2


def test_it_is_copied_pickled_and_compiled():
    model, args = freeze(quantize(attention(), "int4")), inputs({})
    made = model["a"](*args)[0]
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert torch.equal(other["a"](*args)[0], made)
    whole = torch.compile(model["a"], backend="aot_eager")
    torch.testing.assert_close(whole(*args)[0], made, rtol=1e-5, atol=1e-5)


def test_static_scales_are_asked_of_called_layers_only():
    model = nn.Sequential(nn.TransformerEncoderLayer(WIDTH, 4, 128, batch_first=True)).eval()
    quantize(model, "int8", activations="int8", static_activations=True)
    calibrate(model, [noise(2, 5, WIDTH)])
    freeze(model)
    assert model(noise(2, 5, WIDTH)).isfinite().all() and model[0].self_attn.out_proj.activations is None
