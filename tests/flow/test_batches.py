"""What is one batch, and what are several."""

import pytest
import torch

from quanto_hf.flow.batches import batches, count_of

X, Y = torch.arange(12.0).view(6, 2), torch.ones(6)


@pytest.mark.parametrize(
    ("data", "count"),
    [(X, 1), ((X, Y), 1), ((X,), 1), ({"x": X}, 1), ([X, X], 2), (X.split(2), 3), (X.unbind(), 6), ([], 0)],
    ids=["tensor", "arguments", "one-argument", "keywords", "list", "split", "unbind", "empty"],
)
def test_how_many_batches_there_are(data, count):
    assert len(list(batches(data))) == count_of(data) == count


def test_the_pieces_of_a_split_are_not_arguments():
    assert all(isinstance(batch, torch.Tensor) for batch in batches(X.split(4)))


def test_how_many_an_iterator_has_is_not_known():
    assert count_of(iter([X])) is None


@pytest.mark.parametrize("data", ["text", 7, None])
def test_what_is_no_batch_is_an_error(data):
    with pytest.raises(TypeError, match="a batch is a tensor, a tuple or a dict"):
        list(batches(data))


def test_one_tensor_given_twice_is_two_arguments():
    x = torch.ones(2, 3)
    assert count_of((x, x)) == 1 and count_of((torch.ones(2, device="meta"), torch.ones(2, device="meta"))) == 1
