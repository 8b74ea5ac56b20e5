"""Scales that are trained together with the weight."""

import copy

import pytest
import torch
from torch import nn

from quanto_hf.nn import QConv2d, QLinear
from quanto_hf.nn.rounding import SMALLEST
from quanto_hf.qtypes import QTYPES, qint8
from quanto_hf.schemes import make_scheme

every_weight = pytest.mark.parametrize("weights", QTYPES)
K, N = 80, 33


# grids that reach further down than up, so that the sign of a scale says something
signed = pytest.mark.parametrize(
    "weights, group_size", [("int4", None), ("int4", -1), ("int2", None), ("int2", 16)], ids=str
)


def learning(
    weights: str = "int4", dtype=torch.float32, static: bool = True, group_size=None, symmetric=None
) -> QLinear:
    scheme = make_scheme(weights, group_size, symmetric)
    layer = QLinear.from_module(nn.Linear(K, N).to(dtype), scheme, qint8 if static else None)
    if static:
        layer.make_static(0.02)
    layer.learn_scales()
    return layer


def step(layer: nn.Module, x: torch.Tensor, lr: float = 1e-3) -> None:
    layer(x).square().mean().backward()
    torch.optim.Adam(layer.parameters(), lr).step()


@every_weight
def test_scales_start_as_those_of_the_fit_and_change_no_output(weights):
    plain = QLinear.from_module(nn.Linear(K, N), make_scheme(weights))
    layer, x = copy.deepcopy(plain), torch.randn(3, K)
    layer.learn_scales()
    names = ["weight", "bias", "learned_scale", *(["learned_zero"] if "zero" in layer.scheme.names else [])]
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == names
    assert layer.learned_scale.dtype == torch.float32
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-3, atol=1e-3)


@every_weight
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_packed_layer_has_the_numbers_that_were_trained(weights, dtype):
    layer, x = learning(weights, dtype), torch.randn(5, K).to(dtype)
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    step(layer, x)
    assert all(not torch.equal(p, before[n]) for n, p in layer.named_parameters())
    with torch.no_grad():
        wanted = layer(x)
    assert torch.equal(layer(x), wanted)
    # the sign of a learned scale means nothing
    scale, zero = layer.learned_scale.detach().abs(), layer._parameters.get("learned_zero")
    layer.freeze()
    assert torch.equal(layer(x), wanted)
    assert torch.equal(layer.weight_scale, scale.to(layer.weight_scale.dtype))
    if zero is not None:
        assert torch.equal(layer.weight_zero, zero.detach().to(layer.weight_zero.dtype))
    # what is left is that of any frozen layer
    assert list(layer.state_dict()) == [*layer.stored_names, "bias", "input_scale"]
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["bias"]


def test_training_scales_lowers_an_error_that_the_fit_leaves():
    torch.manual_seed(0)
    source, x = nn.Linear(K, N), torch.randn(64, K)
    wanted = source(x).detach()
    layer = QLinear.from_module(source, make_scheme("int2"), fit="minmax")
    layer.weight.requires_grad_(False)
    layer.learn_scales()
    optimizer, losses = torch.optim.Adam([layer.learned_scale, layer.learned_zero], 1e-2), []
    for _ in range(40):
        loss = (layer(x) - wanted).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_the_gradient_of_a_static_scale_is_that_of_learned_step_sizes():
    layer, x = learning("int8"), torch.randn(3, K) * 2
    grad = torch.randn(3, N)
    layer(x).backward(grad)
    s = 0.02
    u = x / s
    inside = u.abs() <= 127
    assert 0.01 < (~inside).float().mean() < 0.9
    frozen = copy.deepcopy(layer)
    frozen.freeze()
    each = torch.where(inside, u.round().clamp(-127, 127) - u, u.sign() * 127) * (grad @ frozen.weight)
    wanted = each.sum() * (x.numel() * 127) ** -0.5
    torch.testing.assert_close(layer.input_scale.grad, wanted.reshape(1), rtol=1e-3, atol=1e-4)


@every_weight
@pytest.mark.parametrize("value", [0.0, -1e-3, -float(SMALLEST)], ids=["zero", "negative", "tiny"])
def test_a_scale_that_a_step_took_to_0_or_below_still_gives_numbers_gradients_and_a_packed_weight(weights, value):
    layer, x = learning(weights), torch.randn(3, K)
    with torch.no_grad():
        layer.learned_scale[::2] = value
        layer.input_scale.neg_()
    made = layer(x)
    made.sum().backward()
    assert made.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())
    layer.freeze()
    assert torch.equal(layer(x), made.detach()) and (layer.weight_scale > 0).all() and (layer.input_scale > 0).all()


def test_a_scale_below_0_has_a_gradient_that_leads_on():
    layer, x = learning("int8", static=False), torch.randn(30, K)
    wanted = nn.functional.linear(x, layer.weight, layer.bias).detach()
    layer.weight.requires_grad_(False)
    with torch.no_grad():
        layer.learned_scale.mul_(-3)
    optimizer = torch.optim.Adam([layer.learned_scale], 1e-4)
    losses = []
    for _ in range(30):
        loss = (layer(x) - wanted).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@signed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_symmetric_int4_and_int2_train_scales_of_both_signs(weights, group_size, dtype):
    layer, x = learning(weights, dtype, group_size=group_size, symmetric=True), torch.randn(5, K).to(dtype)
    start = layer.learned_scale.detach().clone()
    assert (start < 0).any() and (start > 0).any() and "learned_zero" not in dict(layer.named_parameters())
    assert torch.equal(start, layer.scheme.quantize(layer.weight.detach())["scale"].float())
    step(layer, x)
    with torch.no_grad():
        wanted = layer(x)
    trained = layer.learned_scale.detach().clone()
    assert not torch.equal(trained, start)
    layer.freeze()
    assert torch.equal(layer(x), wanted)
    assert torch.equal(layer.weight_scale, trained.to(layer.weight_scale.dtype))


@signed
def test_the_gradient_of_a_signed_scale_is_that_of_its_numbers(weights, group_size):
    """Of rounded values d/ds is the rounding error in steps, of cut ones the last number; the sign of s is in both."""
    scheme = make_scheme(weights, group_size, True)
    layer = QLinear.from_module(nn.Linear(K, N), scheme)
    layer.learn_scales()
    with torch.no_grad():
        # some values are beyond the ends
        layer.learned_scale.mul_(0.7).copy_(layer.learned_scale.to(scheme.scale_type.dtype))
    x, grad = torch.randn(9, K), torch.randn(9, N)
    layer(x).backward(grad)
    size = scheme.group_size if scheme.group_size > 0 else K
    groups = (torch.arange(K) // size).expand(N, -1)
    s, weight = layer.learned_scale.detach().gather(1, groups), layer.weight.detach()
    low, high = scheme.grid.lowest, scheme.grid.highest
    u = weight / s
    inside = (u >= low) & (u <= high)
    assert 0.005 < (~inside).float().mean() < 0.9
    for_weight = grad.T @ x
    each = torch.where(inside, u.round().clamp(low, high) - u, u.clamp(low, high)) * for_weight
    factor = (min(size, K) * -low) ** -0.5
    wanted = torch.zeros_like(layer.learned_scale).scatter_add_(1, groups, each) * factor
    torch.testing.assert_close(layer.learned_scale.grad, wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad, torch.where(inside, for_weight, 0.0), rtol=1e-4, atol=1e-5)


@signed
def test_training_brings_signed_scales_back_to_where_the_error_is_small(weights, group_size):
    torch.manual_seed(0)
    source, x = nn.Linear(K, N), torch.randn(64, K)
    wanted = source(x).detach()
    layer = QLinear.from_module(source, make_scheme(weights, group_size, True), fit="absmax")
    layer.weight.requires_grad_(False)
    layer.learn_scales()
    signs = layer.learned_scale.detach().sign()
    with torch.no_grad():
        layer.learned_scale.mul_(2.5)
    optimizer, losses = torch.optim.Adam([layer.learned_scale], 3e-3 if weights == "int2" else 1e-3), []
    for _ in range(60):
        loss = (layer(x) - wanted).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    assert torch.equal(layer.learned_scale.detach().sign(), signs)


@signed
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-42, -1e-42])
def test_a_signed_scale_on_its_way_through_0_gives_numbers_and_has_a_gradient(weights, group_size, value):
    layer, x = learning(weights, group_size=group_size, symmetric=True), torch.randn(3, K)
    with torch.no_grad():
        layer.learned_scale[::2] = value
    made = layer(x)
    made.sum().backward()
    assert made.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())
    assert (layer.learned_scale.grad[::2] != 0).any()
    layer.freeze()
    assert torch.equal(layer(x), made.detach()) and (layer.weight_scale != 0).all()
    assert torch.equal(
        layer.weight_scale[::2] < 0, torch.full_like(layer.weight_scale[::2] < 0, value < 0 or str(value) == "-0.0")
    )


def test_a_scheme_without_scales_has_nothing_to_learn():
    layer = QLinear.from_module(nn.Linear(64, 8), make_scheme("aqlm-2x4"))
    before = list(layer.state_dict())
    with pytest.raises(ValueError, match="aqlm 2x4 g8 weights have no scales that can be learned; leave out"):
        layer.learn_scales()
    assert list(layer.state_dict()) == before


def test_a_weight_that_has_become_no_number_is_not_packed():
    layer = learning()
    with torch.no_grad():
        layer.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite values"):
        layer.freeze()


def test_casts_keep_learned_scales_in_float32():
    layer = learning().half()
    assert layer.weight.dtype == torch.float16
    assert layer.learned_scale.dtype == layer.learned_zero.dtype == layer.input_scale.dtype == torch.float32


def test_calibrating_again_keeps_the_parameter_that_an_optimizer_knows():
    layer = learning()
    known = layer.input_scale
    layer.make_static(0.5)
    assert layer.input_scale is known and known.item() == 0.5 and known.requires_grad


def test_a_scale_that_is_calibrated_later_is_trained_too():
    layer = QLinear.from_module(nn.Linear(K, N), make_scheme("int4"), qint8)
    layer.learn_scales()
    layer.make_static(0.5)
    assert "input_scale" in dict(layer.named_parameters())


def test_a_frozen_layer_has_nothing_to_learn():
    layer = QLinear.from_module(nn.Linear(K, N), make_scheme("int4"))
    layer.freeze()
    with pytest.raises(ValueError, match=r"is frozen: its scales cannot be learned. Prepare the float model"):
        layer.learn_scales()


def test_state_dicts_round_trip():
    layer, x = learning(), torch.randn(3, K)
    step(layer, x)
    other = learning()
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(x), layer(x))


def test_scales_of_a_convolution_are_trained_too():
    layer = QConv2d.from_module(nn.Conv2d(6, 8, 3), make_scheme("int4"))
    layer.learn_scales()
    x = torch.randn(2, 6, 7, 7)
    step(layer, x)
    wanted = layer(x).detach()
    layer.freeze()
    assert torch.equal(layer(x), wanted)
