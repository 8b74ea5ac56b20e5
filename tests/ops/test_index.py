"""Numbers that choose rows: what is out of range is named, and what has no numbers is let through."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from quanto_hf.ops.index import check_index


def test_the_ends_of_the_range_are_inside():
    for dtype in (torch.uint8, torch.int32, torch.int64):
        check_index(torch.tensor([[0, 4], [4, 2]], dtype=dtype), 5, "row", "the weight")
    check_index(torch.tensor(4), 5, "row", "the weight")
    check_index(torch.empty(0, dtype=torch.int64), 0, "row", "the weight")


@pytest.mark.parametrize("index, worst", [([5], 5), ([-1, 0], -1), ([[0, 9], [7, 1]], 9), (6, 6), ([-7, 99], -7)])
def test_a_number_outside_is_an_error_that_names_it(index, worst: int):
    with pytest.raises(IndexError) as caught:
        check_index(torch.tensor(index), 5, "row", "the weight")
    assert str(caught.value) == f"row {worst} does not exist: the weight has 5 of them, 0 to 4"


def test_where_there_is_nothing_every_number_is_outside():
    with pytest.raises(IndexError, match="expert 0 does not exist: the weight has 0 of them, none"):
        check_index(torch.tensor([0]), 0, "expert", "the weight")


def test_tensors_without_numbers_pass():
    check_index(torch.tensor([9], device="meta"), 5, "row", "the weight")
    mode = FakeTensorMode()
    fake = mode.from_tensor(torch.tensor([9]))
    check_index(fake, 5, "row", "the weight")
    with mode:
        check_index(fake, 5, "row", "the weight")
    torch.func.vmap(lambda index: (check_index(index, 5, "row", "the weight"), index)[1])(torch.tensor([[9]]))
