"""Measures of an error: their definitions, exact over many tensors, and the numbers at the edges."""

import math

import pytest
import torch

from quanto_hf.flow import errors as errors_module
from quanto_hf.flow.errors import Errors, Share


def measured(*pairs):
    errors = Errors()
    for made, wanted in pairs:
        errors.add(made, wanted)
    return errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_measures_are_their_definitions(dtype):
    wanted, made = torch.randn(5, 7, 33).to(dtype), torch.randn(5, 7, 33).to(dtype)
    errors, w, m = measured((made, wanted)), wanted.double(), made.double()
    assert errors.sqnr == pytest.approx(float(10 * torch.log10(w.square().sum() / (m - w).square().sum())), rel=1e-12)
    assert errors.relative == pytest.approx(float((m - w).norm() / w.norm()), rel=1e-12)
    assert errors.cosine == pytest.approx(float((m * w).sum() / (m.norm() * w.norm())), rel=1e-12)
    assert errors.largest == float((m - w).abs().max())
    assert errors.count == w.numel()


def test_batches_are_one_long_tensor_and_not_a_mean_of_ratios(monkeypatch):
    # a quiet batch with a large relative error beside a loud one: the mean of ratios would be far off
    parts = [(torch.randn(n, 8), s * torch.randn(n, 8)) for n, s in ((1, 0.01), (300, 10.0), (7, 1.0))]
    whole = measured(tuple(torch.cat(part) for part in zip(*parts, strict=True)))
    monkeypatch.setattr(errors_module, "BLOCK", 5)
    apart = measured(*parts)
    for name in ("sqnr", "relative", "cosine", "largest", "count"):
        assert getattr(apart, name) == pytest.approx(getattr(whole, name), rel=1e-12)


def test_numbers_that_would_overflow_in_half_and_float32_do_not():
    errors = measured((torch.tensor([6e4, 1.0]).half(), torch.tensor([-6e4, 1.0]).half()))
    assert errors.relative == pytest.approx(2) and errors.largest == 1.2e5
    assert measured((torch.tensor([3e38]), torch.tensor([2e38]))).relative == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("made", "wanted", "sqnr", "relative", "cosine"),
    [
        ([1.0, 2.0], [1.0, 2.0], math.inf, 0, 1),
        ([0.0, 0.0], [0.0, 0.0], math.inf, 0, 1),
        ([1.0, 0.0], [0.0, 0.0], -math.inf, math.inf, 0),
        ([0.0, 0.0], [1.0, 0.0], 0, 1, 0),
        ([-1.0, 0.0], [1.0, 0.0], 10 * math.log10(0.25), 2, -1),
    ],
)
def test_zeros(made, wanted, sqnr, relative, cosine):
    errors = measured((torch.tensor(made), torch.tensor(wanted)))
    assert (errors.sqnr, errors.relative, errors.cosine) == pytest.approx((sqnr, relative, cosine))


@pytest.mark.parametrize("order", [1, -1])
def test_a_nan_is_not_lost_among_finite_batches(order):
    good, bad = (torch.ones(2), torch.zeros(2)), (torch.tensor([math.nan, 1.0]), torch.ones(2))
    errors = measured(*[good, bad][::order])
    assert all(math.isnan(value) for value in (errors.sqnr, errors.relative, errors.cosine, errors.largest))


def test_nothing_is_no_error_and_shapes_must_agree():
    assert measured((torch.zeros(0, 4), torch.zeros(0, 4))).count == 0
    with pytest.raises(ValueError, match=r"one shape are compared, not \(2,\) with \(1,\)"):
        measured((torch.ones(2), torch.ones(1)))


def test_shares_are_summed():
    share = Share()
    assert share.value is None
    share.add(torch.tensor([True, False]))
    share.add(torch.tensor([[False, False], [True, True]]))
    assert share.value == 0.5
