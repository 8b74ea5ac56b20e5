"""The prepared call of an AQLM weight gives the bits of the op, and steps aside where it does not serve."""

import pytest
import torch
from native_weights import every_float, needs_native

from quanto_hf.nn import QuantizedLinear
from quanto_hf.ops import AqlmWeight, linear, linear_op

pytestmark = needs_native


@pytest.fixture
def weight():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (24, 20, 2), generator=generator).to(torch.int8)
    books = torch.randn((2, 256, 1, 8), generator=generator).half()
    return AqlmWeight(codes, books, torch.rand((24, 1, 1, 1), generator=generator).half())


@every_float
@pytest.mark.parametrize("shape", [(160,), (1, 160), (2, 3, 160), (8, 160), (9, 160), (20, 160)], ids=str)
def test_it_gives_the_bits_of_the_op(weight, dtype, shape):
    x, bias, call = torch.randn(shape).to(dtype), torch.randn(24).to(dtype), linear_op.bind(weight)
    assert torch.equal(call(x, bias), linear(x, weight, bias))
    assert torch.equal(call(x, None), linear(x, weight, None))


ASIDE = {
    "gradient": (lambda x: x.requires_grad_(), None),
    "gradient-of-bias": (lambda x: x, torch.zeros(24, requires_grad=True)),
    "strided": (lambda x: torch.randn(160, 3).T, None),
    "float64": (lambda x: x.double(), None),
    "columns": (lambda x: x[:, :152].contiguous(), None),
    "empty": (lambda x: x[:0], None),
    "bias-of-another-size": (lambda x: x, torch.zeros(23)),
    "meta": (lambda x: x.to("meta"), None),
}


@pytest.mark.parametrize("change, bias", ASIDE.values(), ids=ASIDE)
def test_it_steps_aside(weight, change, bias):
    assert linear_op.bind(weight)(change(torch.randn(3, 160)), bias) is None


def test_a_layer_follows_a_weight_that_was_moved(weight):
    layer = QuantizedLinear(160, 24, 8, 1, 2, 8, bias=False, dtype=torch.float16)
    layer.load_state_dict(dict(zip(("codes", "codebooks", "scales"), weight, strict=True)))
    x = torch.randn(2, 160)
    with torch.no_grad():
        before = layer(x)
        layer.scales.data = layer.scales.data * 2
        assert torch.equal(layer(x), before * 2)


def test_there_is_none_for_a_weight_without_rows_and_for_the_reference(weight, monkeypatch):
    codes, books, scales = weight
    assert linear_op.bind(AqlmWeight(codes[:0], books, scales[:0])) is None
    assert linear_op.bind(AqlmWeight(codes[::2], books, scales[::2])) is None
    monkeypatch.setenv("QUANTO_HF_REFERENCE", "1")
    assert linear_op.bind(weight) is None


def test_it_steps_aside_when_the_same_memory_is_read_another_way(weight):
    scales = weight[2]
    call, x = linear_op.bind(weight), torch.randn(3, 160)
    assert call(x, None) is not None
    scales.data = scales.data.view(torch.bfloat16)
    assert call(x, None) is None
