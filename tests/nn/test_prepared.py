"""PREPARED layers: the numbers of FROZEN ones, bit for bit, with the gradients of a float layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quanto_hf.nn import QLinear, State
from quanto_hf.nn.activation import fake_quantize_input
from quanto_hf.qtypes import QTYPES, qtype
from quanto_hf.schemes import make_scheme

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
K, N = 80, 33  # columns that end in a short group, an odd number of rows

every_weight = pytest.mark.parametrize("weights", QTYPES)
every_float = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
# how inputs are rounded: number type, and whether with a static scale
INPUTS = {
    "weight-only": (None, False),
    "x-int8": ("int8", False),
    "x-int8-static": ("int8", True),
    "x-float8": ("float8", False),
    "x-float8-static": ("float8", True),
}
every_input = pytest.mark.parametrize("activations, static", INPUTS.values(), ids=INPUTS)


def prepared(
    weights: str, activations: str | None = None, static: bool = False, dtype=torch.float32, shape=(N, K), bias=True
) -> QLinear:
    source = nn.Linear(shape[1], shape[0], bias=bias).to(dtype)
    layer = QLinear.from_module(source, make_scheme(weights), activations and qtype(activations))
    if static:
        # values of more than 2.5 are beyond it
        layer.make_static(2.5 / layer.activations.qmax)
    return layer


def frozen(layer: QLinear) -> QLinear:
    copied = copy.deepcopy(layer)
    copied.freeze()
    return copied


def assert_same_everywhere(layer: QLinear, x: torch.Tensor) -> None:
    """With gradients and without, of a PREPARED layer and of a FROZEN one: the same bits."""
    # not a clone, which would lie in memory in another way
    packed, asked = frozen(layer), x.detach().requires_grad_()
    with torch.no_grad():
        wanted = packed(x)
    results = {"frozen": packed(x), "frozen, x trains": packed(asked), "prepared": layer(x), "x trains": layer(asked)}
    with torch.no_grad():
        results["prepared, no grad"] = layer(x)
    for name, made in results.items():
        assert made.dtype == wanted.dtype and torch.equal(made, wanted), name


# ------------------------------------------------------------------------------------------------------ the numbers


@every_weight
@every_float
@every_input
def test_a_prepared_layer_gives_the_bits_of_the_frozen_one(weights, dtype, activations, static):
    layer = prepared(weights, activations, static, dtype)
    assert layer.weight_state is State.PREPARED
    for rows in (1, 11):
        assert_same_everywhere(layer, torch.randn(rows, K).to(dtype))


@every_weight
@every_input
def test_also_under_autocast(weights, activations, static):
    layer, x = prepared(weights, activations, static), torch.randn(3, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_everywhere(layer, x)
        assert layer(x).dtype == torch.bfloat16


@given(
    weights=st.sampled_from(sorted(QTYPES)),
    way=st.sampled_from(sorted(INPUTS)),
    rows=st.sampled_from([(), (0,), (1,), (2, 3), (17,)]),
    columns=st.sampled_from([1, 2, 31, 64, 65, 130]),
    outputs=st.sampled_from([1, 7, 16]),
    size=st.sampled_from([0.0, 1e-30, 1.0, 1e30]),
    bias=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_for_every_shape_and_size(weights, way, rows, columns, outputs, size, bias):
    layer = prepared(weights, *INPUTS[way], shape=(outputs, columns), bias=bias)
    with torch.no_grad():
        layer.weight.mul_(size)
    assert_same_everywhere(layer, torch.randn(*rows, columns))


@every_input
def test_a_column_major_x_and_a_slice_of_a_larger_one_are_no_exception(activations, static):
    layer = prepared("int8", activations, static)
    assert_same_everywhere(layer, torch.randn(K, 5).T)
    assert_same_everywhere(layer, torch.randn(5, K + 3)[:, 1 : K + 1])


def test_a_layer_that_does_not_round_is_the_float_layer():
    layer, x = prepared("int2", "int8"), torch.randn(3, K)
    layer.set_rounding(False)
    assert layer.weight_state is State.FLOAT and torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer.set_rounding(True)
    assert layer.weight_state is State.PREPARED and not torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


# ------------------------------------------------------------------------------------------------------ the gradients


def surrogate(layer: QLinear, x: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of the float64 product of the rounded numbers, through which they pass straight."""
    kind = layer.activations
    scale = layer.static_scale
    rounded = x if kind is None else fake_quantize_input(x, kind, layer.scheme.activation_group(kind), scale)
    inside = torch.ones_like(x) if scale is None else ((x.float() / scale).abs() <= kind.qmax).to(x.dtype)
    weight = frozen(layer).weight.double()
    flat = grad.double().reshape(-1, N)
    return {
        "x": (grad.double() @ weight) * inside.double(),
        "weight": flat.T @ rounded.double().reshape(-1, K),
        "bias": flat.sum(0),
    }


# Roundings of sums of at most 80 products of about 1, in units of the last place.
SLACK = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}


@every_weight
@every_float
@every_input
def test_gradients_are_those_of_the_float_product_of_the_rounded_numbers(weights, dtype, activations, static):
    layer = prepared(weights, activations, static, dtype)
    x = torch.randn(2, 3, K).to(dtype).requires_grad_()
    grad = torch.randn(2, 3, N).to(dtype)
    wanted = surrogate(layer, x.detach(), grad)
    layer(x).backward(grad)
    for name, made in (("x", x.grad), ("weight", layer.weight.grad), ("bias", layer.bias.grad)):
        assert made.dtype == dtype
        torch.testing.assert_close(made.double(), wanted[name], rtol=SLACK[dtype], atol=SLACK[dtype], msg=name)
    if static:
        outside = x.detach().abs() > 2.5
        assert outside.any() and not x.grad[outside].any()


@every_weight
@every_input
def test_gradients_of_a_frozen_layer_are_those_of_the_prepared_one(weights, activations, static):
    layer = prepared(weights, activations, static)
    packed = frozen(layer)
    one, two = (torch.ones(3, K).mul(0.7).requires_grad_() for _ in range(2))
    grad = torch.randn(3, N)
    layer(one).backward(grad)
    packed(two).backward(grad)
    torch.testing.assert_close(two.grad, one.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed.bias.grad, layer.bias.grad)
    assert all(p.grad is None for n, p in packed.named_parameters() if n.startswith("weight_"))


def test_mixed_precision_keeps_the_dtype_of_each_gradient():
    layer, x = prepared("int4", "int8"), torch.randn(3, K, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x).float().sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
    wanted = surrogate(layer, x.detach().bfloat16(), torch.ones(3, N))
    torch.testing.assert_close(layer.weight.grad.double(), wanted["weight"], rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("trains", ["x", "weight", "bias", "nothing"])
@every_input
def test_only_what_is_trained_gets_a_gradient(trains, activations, static):
    layer, x = prepared("int4", activations, static), torch.randn(3, K)
    x.requires_grad_(trains == "x")
    layer.weight.requires_grad_(trains == "weight")
    layer.bias.requires_grad_(trains == "bias")
    made = layer(x)
    assert made.requires_grad == (trains != "nothing")
    if made.requires_grad:
        made.sum().backward()
    got = {"x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
    assert [name for name, grad in got.items() if grad is not None] == ([trains] if trains != "nothing" else [])


@every_input
def test_a_batch_without_rows_has_gradients_of_zero(activations, static):
    layer, x = prepared("int8", activations, static), torch.zeros(0, K, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, K) and not layer.weight.grad.any() and not layer.bias.grad.any()


def test_a_second_derivative_is_an_error_and_not_a_wrong_number():
    layer, x = prepared("int8"), torch.randn(3, K, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_weight_that_changed_before_the_backward_pass_is_an_error():
    layer, x = prepared("int8"), torch.randn(3, K, requires_grad=True)
    made = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        made.sum().backward()


def test_no_second_float_copy_is_kept_for_the_backward_pass():
    layer, x, kept = prepared("int4", "int8", dtype=torch.bfloat16), torch.randn(3, K).bfloat16(), []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), layer.weight.data_ptr()}


# ------------------------------------------------------------------------------------------------------ torch's modes


@every_weight
def test_a_compiled_frozen_layer_with_a_static_scale_is_one_graph(weights):
    torch._dynamo.reset()
    packed, x = frozen(prepared(weights, "int8", static=True)), torch.randn(3, K)
    with torch.no_grad():
        made = torch.compile(packed, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(made, packed(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_torch_func_sees_the_gradients_of_a_prepared_layer(weights):
    layer, x = prepared(weights, "int8"), torch.randn(K)

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    made = torch.func.grad(loss)(dict(layer.named_parameters()), x)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(made[name], parameter.grad, rtol=1e-3, atol=1e-4)
