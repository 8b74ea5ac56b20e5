"""Layouts: sizes, dtypes, and the way between a weight and its groups."""

import pytest
import torch

from quanto_hf.fit.aqlm import Layout, decode, quantize_aqlm, read_codes, stored_codes


@pytest.mark.parametrize("out_group, in_group", [(1, 10), (2, 4), (3, 1), (6, 20)])
def test_a_weight_becomes_groups_and_a_weight_again(out_group, in_group):
    layout, weight = Layout(2, 8, out_group, in_group), torch.randn(6, 40)[:, :20]
    groups = layout.to_groups(weight)
    assert groups.shape == (6 // out_group, 20 // in_group, out_group * in_group)
    assert torch.equal(groups[-1, -1].view(out_group, in_group), weight[-out_group:, -in_group:])
    assert torch.equal(layout.to_weight(groups), weight)


@pytest.mark.parametrize("nbits, dtype", [(1, torch.int8), (8, torch.int8), (9, torch.int16), (16, torch.int16)])
def test_codes_are_stored_in_the_smallest_signed_integers(nbits, dtype):
    layout = Layout(1, nbits)
    codes = torch.arange(layout.size, dtype=torch.int32)
    stored = stored_codes(codes, layout)
    assert stored.dtype == dtype and torch.equal(read_codes(stored, layout), codes)
    # what is not above the range of the dtype is stored as it is
    assert stored[: layout.size // 2].tolist() == codes[: layout.size // 2].tolist()


def test_a_group_is_the_sum_of_its_vectors():
    books = torch.randn(3, 4, 5)
    codes = torch.tensor([[[0, 1, 2], [3, 3, 3]]])
    assert torch.allclose(decode(codes, books)[0, 0], books[0, 0] + books[1, 1] + books[2, 2])
    assert torch.allclose(decode(codes, books)[0, 1], books[:, 3].sum(0))


@pytest.mark.parametrize(
    "values, text",
    [
        ((0, 8), "num_codebooks=0 does not work for AQLM weights; choose a whole number from 1 to 1024"),
        ((2, 25), "nbits=25 does not work for AQLM weights; choose a whole number from 1 to 24"),
        ((2, 8, 0), "out_group=0 does not work for AQLM weights; choose a whole number above 0"),
        ((2, 8, 1, 8.0), "in_group=8.0 does not work for AQLM weights; choose a whole number above 0"),
        ((True, 8), "num_codebooks=True does not work for AQLM weights; choose a whole number"),
    ],
)
def test_wrong_sizes_are_named(values, text):
    with pytest.raises(ValueError, match=text):
        Layout(*values)


@pytest.mark.parametrize(
    "values, text",
    [
        ((65, 8), "num_codebooks=65 is out of range; choose 1 to 64"),
        ((2, 17), "nbits=17 is out of range; choose 1 to 16"),
    ],
)
def test_what_can_be_read_but_not_made_is_refused_before_anything_is_computed(values, text):
    assert Layout(*values).refuses() == text and Layout(2, 16).refuses() is None
    with pytest.raises(ValueError, match=text):
        quantize_aqlm(torch.zeros(8, 8), num_codebooks=values[0], nbits=values[1])


@pytest.mark.parametrize(
    "shape, text", [((4, 12), "in_features=12 .* in_group=8"), ((3, 16), "out_features=3 .* out_group=2")]
)
def test_features_that_cannot_be_divided_are_named(shape, text):
    with pytest.raises(ValueError, match=text):
        Layout(1, 8, 2, 8).grid(shape)
