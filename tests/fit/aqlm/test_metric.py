"""The metric: damped, scaled, and refused where it is none."""

import pytest
import torch
from fit.aqlm.problems import inputs, moment

from quanto_hf.fit.aqlm.layout import Layout
from quanto_hf.fit.aqlm.metric import Metric


def test_one_percent_of_the_mean_diagonal_is_added_and_the_mean_is_one():
    given = moment(inputs(50, 16, 0))
    metric = Metric.of(given, Layout(1, 4, 1, 4))
    exact = given.double() / given.diagonal().double().mean() + 0.01 * torch.eye(16, dtype=torch.float64)
    assert torch.allclose(metric.hessian.double(), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_factors_are_those_of_the_blocks(scale):
    metric = Metric.of(moment(inputs(50, 16, 0)) * scale, Layout(1, 4, 1, 4))
    for j in range(4):
        block = metric.hessian[4 * j : 4 * j + 4, 4 * j : 4 * j + 4]
        assert torch.allclose(metric.lower[j] @ metric.lower[j].T, block, atol=1e-4)
        assert torch.allclose(metric.lower[j] @ metric.inverse[j].T, torch.eye(4), atol=1e-3)


@pytest.mark.parametrize("columns, group", [(32, 8), (30, 5), (8, 8), (7, 1)])
def test_looking_ahead_factors_the_hessian(columns, group):
    metric = Metric.of(moment(inputs(200, 32, 0)[:, :columns]), Layout(1, 4, 1, group))
    upper, lower = metric.look_ahead()
    diagonal = torch.block_diag(*(factor @ factor.T for factor in lower))
    assert torch.allclose(upper @ diagonal @ upper.T, metric.hessian, atol=1e-4)
    # unit upper block triangular
    for j in range(0, columns, group):
        assert (upper[j + group :, j : j + group] == 0).all()
        assert torch.equal(upper[j : j + group, j : j + group], torch.eye(group))


def test_the_cost_that_looks_ahead_is_that_of_the_best_columns_to_the_right():
    metric = Metric.of(moment(inputs(200, 16, 0)), Layout(1, 4, 1, 4))
    _, lower = metric.look_ahead()
    h = metric.hessian.double()
    best = h[:4, :4] - h[:4, 4:] @ torch.linalg.solve(h[4:, 4:], h[4:, :4])
    assert torch.allclose((lower[0] @ lower[0].T).double(), best, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "given, text",
    [
        (torch.full((4, 4), torch.nan), "NaN or infinite"),
        (-torch.eye(4), "negative diagonal"),
        (torch.zeros(4, 4), "no input reached"),
        (torch.tensor([[1.0, 5, 0, 0], [5, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "is not one"),
    ],
)
def test_what_is_no_moment_is_refused(given, text):
    with pytest.raises(ValueError, match=text):
        Metric.of(given, Layout(1, 4, 1, 4))
