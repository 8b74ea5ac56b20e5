"""Activations rounded per token or per group of columns: how far off, for whom, and with which gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quanto_hf.nn import QLinear
from quanto_hf.nn.activation import fake_quantize_input
from quanto_hf.qtypes import QType, qfloat8_e4m3fn, qfloat8_e5m2, qint8
from quanto_hf.schemes import make_scheme

TYPES = (qint8, qfloat8_e4m3fn, qfloat8_e5m2)
every_type = pytest.mark.parametrize("kind", TYPES, ids=str)
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
every_float = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)

# half a unit in the last place, and half the smallest number
FLOAT8 = {"float8_e4m3fn": (2**-4, 2**-10), "float8_e5m2": (2**-3, 2**-17)}


@every_type
@given(
    token=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40), size=st.sampled_from([1e-20, 1e-3, 1.0, 1e20])
)
@settings(max_examples=100, deadline=None)
def test_a_value_is_off_by_half_a_step_at_most(kind: QType, token: list[float], size: float):
    x = (torch.tensor(token, dtype=torch.float64) * size).float()
    step = x.double().abs().max() / kind.qmax
    if kind is qint8:
        bound = 0.5 * step
    else:
        relative, smallest = FLOAT8[kind.name]
        bound = torch.maximum(x.double().abs() * relative, smallest * step)
    # float32 rounds the scale, the quotient and the product; below 1e-38 it has fewer digits
    slack = 4 * 2**-24 * x.double().abs().max() + 1e-38
    assert ((fake_quantize_input(x, kind).double() - x.double()).abs() <= bound + slack).all()


@every_type
@every_float
@pytest.mark.parametrize("shape", [(16,), (0, 16), (3, 16), (2, 3, 16)], ids=str)
def test_shape_and_dtype_stay(kind: QType, dtype: torch.dtype, shape: tuple[int, ...]):
    x = torch.randn(shape).to(dtype)
    kept = x.clone()
    made = fake_quantize_input(x, kind)
    assert made.shape == x.shape and made.dtype == dtype
    assert torch.equal(x, kept)


@every_type
@every_float
def test_16_bit_results_are_the_rounded_ones_of_float32(kind: QType, dtype: torch.dtype):
    x = torch.randn(5, 64).to(dtype)
    assert torch.equal(fake_quantize_input(x, kind), fake_quantize_input(x.float(), kind).to(dtype))


def test_int8_uses_whole_steps_and_its_largest_code():
    x = torch.randn(5, 64)
    steps = fake_quantize_input(x, qint8) / (x.abs().amax(-1, keepdim=True) / 127)
    assert torch.allclose(steps, steps.round(), atol=1e-4)
    assert torch.equal(steps.abs().amax(-1).round(), torch.full((5,), 127.0))


@every_type
def test_each_token_has_its_own_scale(kind: QType):
    x = torch.randn(5, 64) * torch.logspace(-6, 6, 5)[:, None]
    together = fake_quantize_input(x, kind)
    assert all(torch.equal(together[i], fake_quantize_input(x[i], kind)) for i in range(5))


@every_type
@every_float
def test_a_token_of_zeros_stays_zero(kind: QType, dtype: torch.dtype):
    x = torch.randn(3, 16).to(dtype)
    x[1] = 0
    made = fake_quantize_input(x, kind)
    assert not made[1].any() and made[0].any() and made[2].any()


@every_type
def test_a_value_that_is_no_number_is_not_hidden_and_spoils_its_token_only(kind: QType):
    x = torch.randn(3, 16)
    x[1, 5] = torch.nan
    made = fake_quantize_input(x, kind)
    assert made[1].isnan().all() and made[[0, 2]].isfinite().all()


@every_type
def test_the_gradient_passes_straight_through(kind: QType):
    x, grad = torch.randn(3, 16, requires_grad=True), torch.randn(3, 16)
    made = fake_quantize_input(x, kind)
    made.backward(grad)
    assert torch.equal(x.grad, grad)
    # and is no reason for another number
    assert torch.equal(made, fake_quantize_input(x.detach(), kind))


@every_type
@every_float
@pytest.mark.parametrize("features", [1, 31, 32, 33, 64, 100])
def test_each_group_of_columns_has_its_own_scale(kind: QType, dtype: torch.dtype, features: int):
    x = (torch.randn(3, features) * torch.logspace(-3, 3, features)).to(dtype)
    together = fake_quantize_input(x, kind, 32)
    assert together.shape == x.shape and together.dtype == dtype
    for start in range(0, features, 32):
        cut = slice(start, start + 32)
        assert torch.equal(together[:, cut], fake_quantize_input(x[:, cut], kind))


def test_an_outlier_costs_digits_in_its_own_group_only():
    x = torch.randn(4, 128)
    x[:, 3] = 1000
    per_token, per_group = (fake_quantize_input(x, qint8, group) for group in (-1, 32))
    assert (per_token[:, 32:] == 0).float().mean() > 0.9
    # half a step of 4 / 127
    assert (per_group[:, 32:] - x[:, 32:]).abs().max() < 0.02


def test_a_value_that_is_no_number_spoils_its_group_and_no_other():
    x = torch.randn(2, 96)
    x[1, 40] = torch.nan
    made = fake_quantize_input(x, qint8, 32)
    assert made[1, 32:64].isnan().all()
    assert made[0].isfinite().all() and made[1, :32].isfinite().all() and made[1, 64:].isfinite().all()


def test_the_gradient_passes_straight_through_groups():
    x, grad = torch.randn(3, 50, requires_grad=True), torch.randn(3, 50)
    fake_quantize_input(x, qint8, 32).backward(grad)
    assert torch.equal(x.grad, grad)


@pytest.mark.parametrize("scale", [None, 0.5, torch.tensor(0.5)], ids=["none", "number", "tensor"])
def test_a_static_scale_is_where_the_layer_is_whatever_the_default_device_is(scale):
    layer = QLinear.from_module(nn.Linear(8, 4), make_scheme("int8"), qint8)
    with torch.device("meta"):
        layer.make_static(scale)
    assert layer.input_scale.device.type == "cpu" and (scale is None or layer.input_scale.item() == 0.5)
