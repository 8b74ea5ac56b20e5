"""Codebooks: the least squares are those of a dense solver, with and without a Hessian."""

import pytest
import torch
from fit.aqlm.problems import inputs, moment

from quanto_hf.fit.aqlm import books
from quanto_hf.fit.aqlm.layout import Layout, decode
from quanto_hf.fit.aqlm.metric import Metric


def dense(codes, targets, weights, layout, hessian):
    """The least weighted squared error by a dense solver: every entry of every codebook is an unknown."""
    rows, columns, width = targets.shape
    unknowns = layout.num_codebooks * layout.size * width
    design = torch.zeros(rows, columns, width, unknowns, dtype=torch.float64)
    for k in range(layout.num_codebooks):
        at = (k * layout.size + codes[..., k].long())[..., None] * width + torch.arange(width)
        design.scatter_add_(3, at[..., None], torch.ones(*at.shape, 1, dtype=torch.float64))
    lines = torch.stack([layout.to_weight(part) for part in design.movedim(3, 0)], -1)  # (out, in, unknowns)
    wanted = layout.to_weight(targets).double()
    factor = torch.linalg.cholesky(hessian.double(), upper=True)
    each = weights.double().sqrt().repeat_interleave(layout.out_group)[:, None]
    design = (torch.einsum("ji,oiu->oju", factor, lines) * each[..., None]).reshape(-1, unknowns)
    wanted = (wanted @ factor.T * each).reshape(-1)
    found = torch.linalg.lstsq(design, wanted[:, None], driver="gelsd").solution
    return float((design @ found - wanted[:, None]).square().sum())


@pytest.mark.parametrize("layout", [Layout(2, 3, 1, 4), Layout(3, 2, 2, 4), Layout(1, 4, 1, 8)], ids=str)
@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "hessian"])
def test_the_codebooks_have_the_least_error(layout, calibrated, monkeypatch):
    monkeypatch.setattr(books, "STEPS_WITH_HESSIAN", 200)
    weight = torch.randn(24, 16)
    targets, weights = layout.to_groups(weight), torch.rand(24 // layout.out_group) + 0.1
    codes = torch.randint(layout.size, (*targets.shape[:2], layout.num_codebooks), dtype=torch.int32)
    metric = Metric.of(moment(inputs(100, 16, 0)), layout) if calibrated else None
    hessian = metric.hessian if metric else torch.eye(16)
    start = torch.randn(layout.num_codebooks, layout.size, layout.width)

    found = books.least_squares(start, codes, targets, weights, layout, metric)

    error = layout.to_weight(targets - decode(codes, found)).double()
    made = float(
        ((error @ hessian.double() * error).sum(1) * weights.double().repeat_interleave(layout.out_group)).sum()
    )
    best = dense(codes, targets, weights, layout, hessian)
    assert made == pytest.approx(best, rel=1e-4)


def test_vectors_that_no_group_uses_stay():
    layout, targets = Layout(2, 3, 1, 4), torch.randn(5, 3, 4)
    codes, start = torch.zeros(5, 3, 2, dtype=torch.int32), torch.randn(2, 8, 4)
    found = books.least_squares(start, codes, targets, torch.ones(5), layout, None)
    assert torch.equal(found[:, 1:], start[:, 1:]) and not torch.equal(found[:, 0], start[:, 0])


def test_k_means_starts_well_below_random_vectors():
    layout, targets = Layout(2, 6), torch.randn(64, 32, 8)
    made, codes = books.start(targets, torch.ones(64), layout, seed=0)
    error = (targets - decode(codes, made)).norm() / targets.norm()
    assert 0.3 < error < 0.5


@pytest.mark.parametrize("groups", [(1, 1), (2, 3)])
def test_fewer_groups_than_vectors_are_met_exactly(groups):
    targets = torch.randn(*groups, 8)
    made, codes = books.start(targets, torch.ones(groups[0]), Layout(1, 8), seed=0)
    assert torch.allclose(decode(codes, made), targets, atol=1e-6)
