"""Which columns of x share a scale, and to what numbers they are rounded."""

import pytest
import torch

from quanto_hf.ops import activation_group, round_activations
from quanto_hf.qtypes import QTYPES, qfloat8, qint8


@pytest.mark.parametrize("weights", QTYPES)
def test_int8_activations_have_groups_for_the_integers_below_8_bits_only(weights: str):
    assert activation_group(QTYPES[weights], qint8) == (32 if weights in ("int4", "int2") else -1)
    assert activation_group(QTYPES[weights], qfloat8) == -1


def test_the_largest_value_of_a_group_is_127_steps():
    # the step is 1 in the first group and 2 in the second, which has one column
    x = torch.zeros(33)
    x[:4] = torch.tensor([127.0, -3.4, 2.5, -127.0])
    x[32] = 254
    wanted = torch.zeros(33)
    wanted[:4] = torch.tensor([127.0, -3.0, 2.0, -127.0])
    wanted[32] = 254
    assert torch.equal(round_activations(x, qint8, 32), wanted)
    assert round_activations(x, qint8)[1] == -4  # one step of 2 for all: -3.4 is -1.7 of them


def test_groups_that_are_wider_than_the_row_are_the_row():
    x = torch.randn(3, 20)
    assert torch.equal(round_activations(x, qint8, 32), round_activations(x, qint8))


def test_the_result_is_float32_of_the_same_shape():
    made = round_activations(torch.randn(2, 3, 70).bfloat16(), qint8, 32)
    assert made.shape == (2, 3, 70) and made.dtype is torch.float32


@pytest.mark.parametrize("group", [32, -1])
def test_a_given_scale_serves_all_of_x(group: int):
    x = torch.tensor([[0.5, 1.5, -2.5, 0.0], [126.6, 127.6, -1e30, 4e-38]]) * 2
    wanted = torch.tensor([[0.0, 2.0, -2.0, 0.0], [127.0, 127.0, -127.0, 0.0]]) * 2
    assert torch.equal(round_activations(x, qint8, group, torch.tensor([[2.0]])), wanted)


def test_a_given_scale_keeps_nan_and_cuts_infinity():
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.0])
    made = round_activations(x, qint8, scale=torch.tensor(1.0))
    assert made[0].isnan() and made[1:].tolist() == [127, -127, 3]
    made = round_activations(x, qfloat8, scale=torch.tensor(1.0))
    assert made[0].isnan() and made[1:].tolist() == [448, -448, 3]


def test_the_scale_that_x_has_itself_changes_nothing():
    x = torch.randn(70)
    assert torch.equal(round_activations(x, qint8, scale=x.abs().max() / 127), round_activations(x, qint8))


@pytest.mark.parametrize("scale", [torch.ones(2), torch.ones(0), torch.tensor(1.0).double(), torch.tensor(1)])
def test_a_scale_that_is_not_one_float32_number_is_an_error(scale: torch.Tensor):
    with pytest.raises(ValueError, match="one float32 number"):
        round_activations(torch.randn(4), qint8, scale=scale)
