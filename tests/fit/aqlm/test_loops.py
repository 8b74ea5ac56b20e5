"""Native loops that are wrong on this machine are reported once and never used; sums have one order."""

import warnings

import pytest
import torch
from native_weights import needs_native

from quanto_hf.fit.aqlm import loops, quantize_aqlm
from quanto_hf.ops.cpu.aqlm_loops import native_code_sums, native_product, native_search
from quanto_hf.ops.cpu.library import NATIVE


@pytest.fixture(autouse=True)
def _nothing_is_known():
    loops.why_wrong.cache_clear()
    yield
    loops.why_wrong.cache_clear()


@needs_native
def test_the_native_loops_agree_with_torch():
    assert loops.runs_native(torch.device("cpu"))


@needs_native
@pytest.mark.parametrize("name", ["aqlm_search", "aqlm_sweep", "code_sums"])
def test_wrong_loops_are_reported_once_and_never_used(name, monkeypatch):
    # they do nothing: codes stay as they are, sums stay zero
    monkeypatch.setattr(NATIVE, name, lambda *args: None)
    weight = torch.randn(16, 32)
    with pytest.warns(RuntimeWarning, match="loops of additive codebooks disagree"):
        quantize_aqlm(weight, num_codebooks=2, nbits=3, hessian=torch.eye(32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = quantize_aqlm(weight, num_codebooks=2, nbits=3)
    assert float((again.dequantize() - weight).norm() / weight.norm()) < 0.9


@needs_native
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (13, 300, 33), (5, 700, 100), (30, 8, 64), (2, 257, 7), (0, 4, 5)])
def test_the_product_is_that_of_torch_for_any_number_of_threads(m, k, n):
    a, b = torch.randn(m, k), torch.randn(k, n)
    exact = (a.double() @ b.double()).float()
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(native_product(a, b))
    assert torch.allclose(found[0], exact, atol=1e-4)
    assert all(torch.equal(found[0], other) for other in found[1:])


@needs_native
@pytest.mark.parametrize("groups, rows, size, width", [(1, 1, 1, 1), (60, 12, 5, 8), (100, 4, 300, 3)])
def test_sums_by_code_are_those_of_torch_for_any_number_of_threads(groups, rows, size, width):
    values, weights = torch.randn(groups, width), torch.rand(rows)
    codes = torch.randint(size, (groups, 2), dtype=torch.int32)
    exact = loops.torch_code_sums(values, weights, codes, size)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        made = native_code_sums(values, weights, codes, size)
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(made, exact, strict=True))


@needs_native
def test_tensors_that_a_loop_would_read_past_are_refused():
    row, codes = torch.randn(1, 4), torch.zeros(6, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"contiguous torch.float32 .* shape \[6, 4\] has strides \(0, 1\)"):
        native_code_sums(row.expand(6, 4), torch.ones(6), codes, 3)
    with pytest.raises(ValueError, match=r"dtype torch.float64"):
        native_code_sums(torch.randn(6, 4).double(), torch.ones(6), codes, 3)
    with pytest.raises(ValueError, match=r"contiguous torch.int32 .* dtype torch.int64"):
        native_search(torch.randn(6, 4), torch.randn(1, 3, 4), codes.long(), 1)
    with pytest.raises(ValueError, match="strides"):
        native_product(torch.randn(4, 6).T, torch.randn(4, 5))
    with pytest.raises(ValueError, match="rows of b are not contiguous"):
        native_product(torch.randn(6, 4), torch.randn(5, 4).T)


@pytest.mark.parametrize("count", [0, 1, loops.SUMMED + 3, 5 * loops.SUMMED])
def test_totals_do_not_know_threads(count):
    values, found = torch.rand(count), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append((loops.total(values), loops.row_totals(values.view(1, -1))[0]))
    assert float(found[0][0]) == pytest.approx(float(values.double().sum()), rel=1e-4)
    assert all(torch.equal(a, b) for pair in found for a, b in zip(pair, found[0], strict=True))
