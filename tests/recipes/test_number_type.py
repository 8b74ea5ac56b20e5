"""Recipe: add a number type. One entry: integers of 3 bits."""

import pytest
import torch
from recipes import journey

from quanto_hf.cli.options import number_types
from quanto_hf.ops import dequantize_op, packed_width
from quanto_hf.qtypes import QType, register_qtype, weight_names
from quanto_hf.schemes import make_scheme

INT3 = QType(
    "int3", 3, "int", -4, 3, group_size=64, symmetric=False, fit="mse", start_ratios=(0.65, 0.8, 0.9, 1.0)
)  # fmt: skip


def add():
    return register_qtype(INT3)


@pytest.fixture
def int3():
    with journey.added(add) as kind:
        yield kind


def test_a_plain_model_is_quantized(int3):
    # 3 bits, and for 64 columns a scale and a zero of 16 bits
    journey.plain_model({"weights": "int3"}, 0.2, 3.5)
    journey.plain_model({"weights": int3, "symmetric": True, "activations": "int8"}, 0.25, 3.25)


def test_scales_are_learned(int3):
    model = torch.nn.Sequential(torch.nn.Linear(128, 8))
    journey.quantize(model, "int3", learn_scales=True)
    model(torch.randn(3, 128)).sum().backward()
    assert model[0].learned_scale.grad is not None and journey.freeze(model)[0].is_frozen


def test_a_model_of_transformers_takes_the_whole_journey(int3, tmp_path):
    journey.transformers_model("recipes.test_number_type", {"weights": "int3"}, tmp_path, "int3 g64 asym")


def test_lists_of_types_have_it(int3):
    assert "int3" in weight_names() and make_scheme("int3").type is int3
    assert "int3" in [scheme.qtype for scheme in number_types(None)]
    with pytest.raises(ValueError, match="int3"):
        journey.QuantoConfig("int5")


@pytest.mark.parametrize("columns", [1, 7, 64, 200])
@pytest.mark.parametrize("group_size", [-1, 64])
def test_numbers_come_back_as_the_definition_has_them(int3, columns, group_size):
    scheme = make_scheme("int3", group_size)
    tensors = scheme.quantize(torch.randn(5, columns))
    assert tensors["packed"].shape == (5, packed_width(columns, 3))
    wanted = dequantize_op.reference(scheme.weight(tensors, columns), torch.float32)
    assert torch.equal(scheme.dequantize(tensors, columns, torch.float32), wanted)
    x = torch.randn(2, columns)
    wanted = x @ scheme.dequantize(tensors, columns, torch.float32).T
    torch.testing.assert_close(scheme.linear(x, tensors, None), wanted)
    assert torch.equal(
        scheme.rows(tensors, torch.tensor([3, 1]), columns, torch.float32),
        scheme.dequantize(tensors, columns, torch.float32)[[3, 1]],
    )
