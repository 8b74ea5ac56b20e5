"""GPT-2's Conv1D with a quantized weight computes what a linear layer with the transposed weight does."""

import copy
import io

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quanto_hf import calibrate, dequantize, freeze, quantize
from quanto_hf.flow.moments import collect_moments
from quanto_hf.nn import QConv1D, QLinear
from quanto_hf.nn.learned import LearnedScales

KINDS = ["int8", "int4", "int2", "float8", "nf4"]


def pair(rows=24, columns=128):
    """A Conv1D and the linear layer with the same numbers, each in a model."""
    torch.manual_seed(0)
    conv, linear = Conv1D(rows, columns), nn.Linear(columns, rows)
    with torch.no_grad():
        conv.bias.normal_()
        linear.weight.copy_(conv.weight.T)
        linear.bias.copy_(conv.bias)
    return nn.Sequential(conv), nn.Sequential(linear)


def x(*shape):
    return torch.randn(*shape, 128, generator=torch.Generator().manual_seed(1))


def both(*args, **kwargs):
    return [quantize(model, *args, **kwargs) for model in pair()]


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_and_frozen_it_is_the_linear_layer_bit_for_bit(kind):
    conv, linear = both(kind)
    assert isinstance(conv[0], QConv1D) and isinstance(conv[0], Conv1D) and not isinstance(conv[0], nn.Linear)
    for shape in ((), (1,), (2, 5), (40,)):
        assert torch.equal(conv(x(*shape)), linear(x(*shape)))
    conv(x(3)).sum().backward()
    linear(x(3)).sum().backward()
    assert torch.equal(conv[0].weight.grad, linear[0].weight.grad.T)
    freeze(conv), freeze(linear)
    assert isinstance(linear[0], QLinear) and conv[0].bound_call() is not None
    for name, tensor in linear.state_dict().items():
        assert torch.equal(conv.state_dict()[name], tensor)
    for shape in ((), (1,), (2, 5), (40,)):
        assert torch.equal(conv(x(*shape)), linear(x(*shape)))
    assert torch.equal(conv[0].weight.dequantize(), linear[0].weight.T) and conv[0].weight.shape == (128, 24)


@pytest.mark.parametrize("static", [False, True])
def test_inputs_can_be_rounded(static):
    made = both("int8", activations="int8", static_activations=static)
    for model in made:
        if static:
            calibrate(model, [x(4)])
    prepared = made[0](x(4))
    assert torch.equal(prepared, made[1](x(4)))
    for model in made:
        freeze(model)
    assert torch.equal(made[0](x(4)), made[1](x(4))) and torch.equal(made[0](x(4)), prepared)


def test_scales_can_be_learned():
    conv, linear = both("int4", learn_scales=True)
    assert isinstance(conv[0], LearnedScales)
    for model in (conv, linear):
        model(x(4)).square().sum().backward()
    assert torch.equal(conv[0].learned_scale.grad, linear[0].learned_scale.grad)
    assert torch.equal(conv[0].weight.grad, linear[0].weight.grad.T)
    freeze(conv), freeze(linear)
    assert torch.equal(conv(x(4)), linear(x(4)))


def test_gradients_reach_inputs_of_a_frozen_one():
    conv, linear = (freeze(model) for model in both("int4"))
    grads = []
    for model in (conv, linear):
        given = x(3).requires_grad_()
        model(given).sum().backward()
        grads.append(given.grad)
    assert torch.equal(*grads) and conv[0].bias.grad is not None


def test_it_is_compiled_copied_pickled_and_given_back():
    conv = both("int8")[0]
    whole = torch.compile(conv, backend="aot_eager", fullgraph=True)
    assert torch.equal(whole(x(4)), conv(x(4)))
    freeze(conv)
    whole = torch.compile(conv, backend="aot_eager", fullgraph=True)
    assert torch.equal(whole(x(4)), conv(x(4)))
    stream = io.BytesIO()
    torch.save(conv, stream)
    stream.seek(0)
    for other in (copy.deepcopy(conv), torch.load(stream, weights_only=False)):
        assert torch.equal(other(x(4)), conv(x(4)))
    assert repr(conv[0]) == "QConv1D(nf=24, nx=128, weights=int8)" and (conv[0].nf, conv[0].nx) == (24, 128)
    made = conv(x(4))
    plain = dequantize(conv)[0]
    assert type(plain) is Conv1D and (plain.nf, plain.nx) == (24, 128) and plain.weight.is_contiguous()
    torch.testing.assert_close(plain(x(4)), made, rtol=1e-5, atol=1e-5)


def test_an_input_of_another_width_is_an_error_and_moments_are_collected():
    conv = freeze(both("int4")[0])
    with pytest.raises(ValueError, match=r"QConv1D\(nf=24, nx=128.*takes inputs of shape \(\.\.\., 128\), not"):
        conv(torch.zeros(2, 127))
    given = x(50)
    found = collect_moments(conv, [given])["0"]
    torch.testing.assert_close(found, given.T @ given / 50)
