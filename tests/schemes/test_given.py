"""Scales that somebody else has: what is stored for them, and their gradients."""

import pytest
import torch

from quanto_hf.qtypes import QTYPES
from quanto_hf.schemes import make_scheme

every_weight = pytest.mark.parametrize("weights", QTYPES)
ROWS, COLUMNS = 5, 80


def found(weights: str, weight: torch.Tensor):
    """A scheme, and the scales that its fit finds."""
    scheme = make_scheme(weights)
    stored = scheme.quantize(weight)
    return scheme, stored["scale"].float(), stored["zero"].float() if "zero" in stored else None


@every_weight
def test_the_scales_of_the_fit_store_what_the_fit_stores(weights):
    weight = torch.randn(ROWS, COLUMNS)
    scheme, scale, zero = found(weights, weight)
    wanted, made = scheme.quantize(weight), scheme.encode(weight, scale, zero)
    assert list(made) == list(wanted)
    assert torch.equal(made["scale"], wanted["scale"]) and made["scale"].dtype == wanted["scale"].dtype
    # a division rounds a tie to another code than a product with 1 / scale
    exact = [scheme.dequantize(t, COLUMNS, torch.float32) for t in (made, wanted)]
    assert (exact[0] != exact[1]).sum() <= 1


@pytest.mark.parametrize("weights", [name for name, kind in QTYPES.items() if kind.kind == "int"])
def test_what_is_stored_is_next_to_the_weight(weights):
    weight = torch.randn(ROWS, COLUMNS)
    scheme, scale, zero = found(weights, weight)
    # all numbers of the grid, of each group
    codes = torch.arange(2**scheme.type.bits) if scheme.type.is_packed else torch.arange(-127, 128)
    made = scheme.dequantize(scheme.encode(weight, scale, zero), COLUMNS, torch.float32)
    groups = (torch.arange(COLUMNS) // (scheme.group_size if scheme.group_size > 0 else COLUMNS)).expand(ROWS, -1)
    scale, zero = scale.gather(1, groups), 0.0 if zero is None else zero.gather(1, groups)
    nearest = (((codes.view(-1, 1, 1) - zero) * scale) - weight).abs().amin(0)
    torch.testing.assert_close((made - weight).abs(), nearest, rtol=1e-4, atol=1e-6)


@every_weight
def test_the_value_of_fake_quantization_is_the_stored_one_to_the_last_bit(weights):
    weight = torch.randn(ROWS, COLUMNS) * 3
    scheme, scale, zero = found(weights, weight / 3)
    # scales between those that bfloat16 can hold
    scale = (scale * 1.01).requires_grad_()
    made = scheme.fake_quantize(weight.clone().requires_grad_(), scale, zero)
    wanted = scheme.dequantize(scheme.encode(weight, scale, zero), COLUMNS, torch.float32)
    assert made.requires_grad and torch.equal(made, wanted)


@every_weight
def test_gradients_are_those_of_learned_step_sizes(weights):
    """Esser et al. 2020 and Bhalgat et al. 2020, written out for each value."""
    weight = torch.randn(ROWS, COLUMNS)
    scheme, scale, zero = found(weights, weight)
    # some values are beyond the ends
    scale = (scale * 0.7).to(scheme.scale_type.dtype).float()
    inputs = [t.clone().requires_grad_() for t in (weight, scale, zero) if t is not None]
    grad = torch.randn(ROWS, COLUMNS)
    made = scheme.fake_quantize(*inputs)
    made.backward(grad)

    size = scheme.group_size if scheme.group_size > 0 else COLUMNS
    groups = (torch.arange(COLUMNS) // size).expand(ROWS, -1)
    s, z = scale.gather(1, groups), torch.zeros(ROWS, COLUMNS) if zero is None else zero.gather(1, groups)
    low, high = scheme.grid.lowest, scheme.grid.highest
    u = weight / s + z
    inside = (u >= low) & (u <= high)
    assert 0.01 < (~inside).float().mean() < 0.9
    number = made.detach() / s + z
    for_scale = torch.where(inside, number - u, number - z)
    for_zero = torch.where(inside, torch.zeros_like(s), -s)
    factor = (min(size, COLUMNS) * max(abs(low), abs(high))) ** -0.5

    def summed(each):
        return torch.zeros_like(scale).scatter_add_(1, groups, each * grad) * factor

    torch.testing.assert_close(inputs[0].grad, torch.where(inside, grad, torch.zeros_like(grad)))
    torch.testing.assert_close(inputs[1].grad, summed(for_scale), rtol=1e-3, atol=1e-4)
    if zero is not None:
        torch.testing.assert_close(inputs[2].grad, summed(for_zero), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weights", QTYPES)
@pytest.mark.parametrize("symmetric", [None, True], ids=["default", "symmetric"])
def test_scales_have_signs_where_the_grid_reaches_further_down_than_up(weights, symmetric):
    scheme = make_scheme(weights, symmetric=symmetric)
    weight = torch.randn(20, COLUMNS)
    scale = scheme.quantize(weight)["scale"]
    assert scheme.signed_scales == bool((scale < 0).any()) == (symmetric is True and weights in ("int4", "int2"))


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("-inf")])
def test_a_signed_scale_that_is_0_or_no_number_is_refused(bad):
    scheme = make_scheme("int4", symmetric=True)
    scale = scheme.quantize(torch.randn(ROWS, COLUMNS))["scale"]
    scale[2, 1] = bad
    with pytest.raises(ValueError, match="scales of a int4 g64 weight are finite numbers other than 0"):
        scheme.encode(torch.randn(ROWS, COLUMNS), scale)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_a_positive_number_is_refused(bad):
    scheme, scale, zero = found("int4", torch.randn(ROWS, COLUMNS))
    scale[2, 1] = bad
    with pytest.raises(ValueError, match="scales of a int4 g64 asym weight are positive and finite numbers"):
        scheme.encode(torch.randn(ROWS, COLUMNS), scale, zero)


def test_a_scale_of_another_shape_is_refused_and_both_shapes_are_told():
    scheme, scale, zero = found("int4", torch.randn(ROWS, COLUMNS))
    with pytest.raises(ValueError, match=r"the scale of a .* has shape \(5, 2\), but this is \(5, 1\)"):
        scheme.encode(torch.randn(ROWS, COLUMNS), scale[:, :1], zero)
    with pytest.raises(ValueError, match=r"the zero of a .* has shape \(5, 2\), but this is None"):
        scheme.encode(torch.randn(ROWS, COLUMNS), scale, None)
