"""Second moments: those of all rows, whatever the batches, and nothing of the model changes."""

import pytest
import torch
from torch import nn

from quanto_hf.flow import collect_moments


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(5, 5)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.second(self.drop(self.first(x)))


def test_the_moment_is_the_mean_over_all_rows():
    model = Two()
    batches = [torch.randn(3, 5, 8), torch.randn(2, 8) * 10, torch.zeros(0, 8)]
    found = collect_moments(model, batches)
    x = torch.cat([batch.reshape(-1, 8) for batch in batches])
    hidden = model.first(x)
    assert set(found) == {"first", "second"}
    assert torch.allclose(found["first"], x.T @ x / 17, rtol=1e-4, atol=1e-4)
    assert torch.allclose(found["second"], hidden.T @ hidden / 17, rtol=1e-4, atol=1e-4)


def test_modes_and_hooks_are_as_before():
    model = Two()
    model.drop.eval()
    collect_moments(model, [{"x": torch.randn(2, 8)}, (torch.randn(2, 8),)], ["second"])
    assert model.training and not model.drop.training
    assert not model.second._forward_pre_hooks


def test_hooks_go_when_the_model_fails():
    model = Two()
    with pytest.raises(RuntimeError):
        collect_moments(model, [torch.randn(2, 9)])
    assert model.training and not model.first._forward_pre_hooks


def test_many_rows_of_16_bits_are_summed_in_float32():
    model, x = nn.Sequential(nn.Linear(4, 2)).bfloat16(), torch.full((70000, 4), 3.0, dtype=torch.bfloat16)
    found = collect_moments(model, [x, x])["0"]
    assert found.dtype == torch.float32 and torch.allclose(found, torch.full((4, 4), 9.0))


@pytest.mark.parametrize(
    "data, modules, text", [([], None, "there is no batch"), ([torch.randn(1, 8)], ["drop", "no"], "drop, no")]
)
def test_mistakes_are_named(data, modules, text):
    with pytest.raises(ValueError, match=text):
        collect_moments(Two(), data, modules)


def test_one_batch_is_a_batch_and_not_a_list_of_its_rows_or_names():
    model, seen = Two(), torch.randn(4, 8)
    calls = []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    one, several = collect_moments(model, {"x": seen}), collect_moments(model, [seen])
    assert len(calls) == 2 and torch.equal(one["first"], several["first"])
    collect_moments(model, seen)
    assert calls[2][0][0].shape == (4, 8)
