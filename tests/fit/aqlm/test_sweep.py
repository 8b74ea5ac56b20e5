"""The pass over column groups: errors of outputs fall, and native is as in torch."""

import pytest
import torch
from fit.aqlm.problems import inputs, moment
from native_weights import needs_native

from quanto_hf.fit.aqlm.layout import Layout, decode
from quanto_hf.fit.aqlm.metric import Metric
from quanto_hf.fit.aqlm.sweep import sweep as torch_sweep
from quanto_hf.ops.cpu.aqlm_loops import native_sweep

# layout, rows, columns
CASES = [
    (Layout(1, 4, 1, 8), 1, 8), (Layout(2, 5, 1, 8), 70, 64), (Layout(3, 3, 2, 5), 10, 65),
    (Layout(1, 8, 1, 16), 33, 48), (Layout(2, 4, 3, 1), 9, 31),
]  # fmt: skip


def cost(layout, weight, metric, books, codes):
    error = weight - layout.to_weight(decode(codes, books))
    return float((error @ metric.hessian * error).sum())


def run(sweep, layout, weight, metric, books, start, ahead):
    codes = start.clone()
    if ahead:
        upper, lower = metric.look_ahead()
        sweep(weight.clone(), weight, upper, lower, lower, books, codes, layout.out_group, 4)
    else:
        state = (weight - layout.to_weight(decode(codes, books))) @ metric.hessian
        sweep(state, None, metric.hessian, metric.lower, metric.inverse, books, codes, layout.out_group, 4)
    return codes, cost(layout, weight, metric, books, codes)


def problem(layout, rows, columns):
    weight = torch.randn(rows, columns)
    metric = Metric.of(moment(inputs(200, max(columns, 8), 0)[:, :columns]), layout)
    books = torch.randn(layout.num_codebooks, layout.size, layout.width)
    start = torch.randint(layout.size, (*layout.grid((rows, columns)), layout.num_codebooks), dtype=torch.int32)
    return weight, metric, books, start


@needs_native
@pytest.mark.parametrize("layout, rows, columns", CASES)
@pytest.mark.parametrize("ahead", [False, True], ids=["stay", "ahead"])
def test_a_pass_lowers_the_error_and_native_is_as_in_torch(layout, rows, columns, ahead):
    weight, metric, books, start = problem(layout, rows, columns)
    codes, made = run(torch_sweep, layout, weight, metric, books, start, ahead)
    native, natively = run(native_sweep, layout, weight, metric, books, start, ahead)
    assert made < cost(layout, weight, metric, books, start)
    assert natively == pytest.approx(made, rel=1e-3)
    assert (native == codes).all(-1).float().mean() > 0.95


def test_looking_ahead_ends_lower_than_codes_that_stay():
    layout = Layout(2, 4)
    weight, metric, books, start = problem(layout, 64, 128)
    errors = [run(torch_sweep, layout, weight, metric, books, start, ahead)[1] for ahead in (False, True)]
    assert errors[1] < 0.9 * errors[0]


def test_a_second_pass_ends_no_higher():
    layout = Layout(2, 4)
    weight, metric, books, start = problem(layout, 64, 128)
    codes, first = run(torch_sweep, layout, weight, metric, books, start, True)
    assert run(torch_sweep, layout, weight, metric, books, codes, False)[1] < first


@pytest.mark.parametrize("ahead, found", [(False, [1, 0]), (True, [0, 1])], ids=["stay", "ahead"])
def test_later_columns_make_up_for_the_errors_of_those_before(ahead, found):
    # two equal inputs: what the first weight lacks, or has too much, the second can give. A second weight that stays 0
    # leaves all of 0.95 to the first; one that may still become anything lets the first be what is nearest to 0.49
    layout = Layout(1, 1, 1, 1)
    metric = Metric.of(torch.ones(2, 2), layout)
    books, start = torch.tensor([[[0.0], [1.0]]]), torch.zeros(1, 2, 1, dtype=torch.int32)
    codes, _ = run(torch_sweep, layout, torch.tensor([[0.49, 0.46]]), metric, books, start, ahead)
    assert codes.flatten().tolist() == found
