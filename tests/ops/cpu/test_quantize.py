"""The native quantizer against the same in plain torch, for every level of instructions that this processor has."""

from dataclasses import replace

import pytest
import torch
from native_weights import FLOATS, each_level, every_float, needs_native

from quanto_hf.fit import Grid, Hqq, Mse, fit_by_name, native_fit
from quanto_hf.fit.grid import CELLS, lookup_tables
from quanto_hf.fit.native import native_table
from quanto_hf.ops import linear, linear_op, quantize_op
from quanto_hf.ops.cpu import quantize as module
from quanto_hf.ops.cpu.library import NATIVE
from quanto_hf.qtypes import QTYPES
from quanto_hf.schemes import make_scheme

pytestmark = needs_native

SCHEMES = {
    str(scheme).replace(" ", "-"): scheme
    for scheme in (
        make_scheme("int8"),
        make_scheme("int8", 64),
        make_scheme("int4"),
        make_scheme("int4", 16, True),
        make_scheme("int4", -1),
        make_scheme("int4", -1, True),
        make_scheme("int2"),
        make_scheme("int2", 256, True),
        make_scheme("int2", -1),
        make_scheme("float8"),
        make_scheme("float8_e5m2"),
        make_scheme("nf4"),
        make_scheme("fp4"),
        make_scheme("fp4", -1),
    )
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
SEARCHES = {
    f"{name}-{fit}": (scheme, fit)
    for name, scheme in SCHEMES.items()
    for fit in ("mse", "mse_gain", "hqq")
    if fit != "hqq" or not scheme.symmetric
}
every_search = pytest.mark.parametrize("scheme, fit", SEARCHES.values(), ids=SEARCHES)
SHAPES = [(1, 1), (1, 5), (1, 4099), (3, 77), (5, 200), (37, 560), (70, 384)]


@pytest.fixture
def both(monkeypatch):
    """(native, torch) results for the same weight, at one level of instructions after the other."""

    def quantize(scheme, weight, fit):
        monkeypatch.setenv("QUANTO_HF_REFERENCE", "1")
        expected = scheme.quantize(weight, fit)
        monkeypatch.delenv("QUANTO_HF_REFERENCE")
        for _level in each_level():
            calls = []
            monkeypatch.setattr(module, "NATIVE", Spy(calls))
            native = scheme.quantize(weight, fit)
            assert calls or not weight.numel(), "the native quantizer was not asked"
            yield native, expected

    return quantize


class Spy:
    """The native module, which notes that it was called, and that it succeeded."""

    def __init__(self, calls):
        self.calls = calls

    def quantize(self, *args):
        assert NATIVE.quantize(*args)
        self.calls.append(args)
        return True


def awkward(shape, dtype, generator=None):
    """Random rows; where there are enough of them, also what tends to break: zeros, outliers, constants, subnormals."""
    weight = torch.randn(shape, generator=generator)
    if shape[0] > 30:
        weight[1] = 0
        weight[2, ::3] = -0.0
        weight[3] *= 1e-4
        weight[4] *= 300
        weight[5] = 0.375
        weight[6] = -2
        weight[7, 70:] = 0
        weight[8] += 40
        weight[9] = weight[9].abs()
        weight[10, 5] = 1000
        weight[11] = weight[11].round()  # ties
        weight[12] = weight[12].mul(2).round().div(2)
        weight[13] *= torch.finfo(dtype).tiny / 8
        weight[14] *= torch.finfo(dtype).smallest_normal * 4
        weight[15, :] = torch.finfo(dtype).smallest_normal
        weight[16, 3] = torch.finfo(dtype).max / 4
        weight[17] = torch.linspace(-1, 1, shape[1])
    return weight.to(dtype)


def assert_same(made, expected):
    assert list(made) == list(expected)
    for name, tensor in expected.items():
        assert made[name].dtype == tensor.dtype
        assert torch.equal(made[name], tensor), f"{name}: {(made[name] != tensor).sum()} of {tensor.numel()} differ"


@every_scheme
@every_float
def test_the_whole_range_gives_the_same_bits_as_torch(scheme, dtype, both):
    for shape in SHAPES:
        for made, expected in both(scheme, awkward(shape, dtype), "minmax" if not scheme.symmetric else "absmax"):
            assert_same(made, expected)


@every_scheme
@pytest.mark.parametrize("exponent", [-40, -37, 37.8], ids=["subnormal", "tiny", "huge"])
def test_the_ends_of_the_range_of_floats_give_the_same_bits_as_torch(scheme, exponent, both):
    weight = (torch.rand(20, 200, dtype=torch.float64) * 2 - 1).mul(10**exponent).float()
    for made, expected in both(scheme, weight, "minmax"):
        assert_same(made, expected)


def row_errors(scheme, weight, tensors):
    made = scheme.dequantize(tensors, weight.shape[1], torch.float32).double()
    return (made - weight.double()).norm(dim=1)


@every_search
@every_float
def test_a_search_ends_as_near_to_the_weight_as_in_torch(scheme, fit, dtype, both):
    # three of the seven shapes for each combination, so that over the dtypes a search meets all of them
    first = list(SEARCHES.values()).index((scheme, fit)) + 3 * list(FLOATS.values()).index(dtype)
    for shape in (SHAPES[(first + step) % 7] for step in range(3)):
        weight = torch.randn(shape).to(dtype)
        for results in both(scheme, weight, fit):
            made, expected = (row_errors(scheme, weight, tensors).norm() for tensors in results)
            assert made <= expected * (1 + 1e-3) and (expected <= made * (1 + 1e-3) or fit == "hqq")


@every_search
@every_float
def test_a_search_ends_near_the_weight_in_every_awkward_row(scheme, fit, dtype, both):
    # beyond 1e18 the sums of squares are infinite
    weight = awkward((37, 560), dtype).float().clamp(-1e18, 1e18).to(dtype)
    for results in both(scheme, weight, fit):
        made, expected = (row_errors(scheme, weight, tensors) for tensors in results)
        # one code that flips on a tie, or an iteration that stops elsewhere, moves a single row by more than the whole
        assert (made <= expected * 1.01 + weight.double().norm(dim=1) * 1e-5).all()


@every_search
def test_the_scales_of_a_search_are_those_of_torch_but_for_a_few_ties(scheme, fit, both):
    for made, expected in both(scheme, torch.randn(64, 512) * 0.02, fit):
        same = made["scale"].isclose(expected["scale"], rtol=1e-5, atol=0).float().mean()
        assert same >= 0.97


@every_scheme
def test_threads_and_levels_give_the_same_bits(scheme, monkeypatch):
    weight, fits = awkward((37, 560), torch.bfloat16), ["mse_gain", "minmax"] + ["hqq"] * (not scheme.symmetric)
    for fit in fits:
        for _level in each_level():
            results = []
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                results.append(scheme.quantize(weight, fit))
            for result in results[1:]:
                assert_same(result, results[0])


@every_scheme
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
def test_what_is_not_finite_is_refused_with_the_usual_error(scheme, bad, level):
    for row, column in [(0, 0), (19, 199), (7, 100), (3, 192)]:
        weight = torch.randn(20, 200)
        weight[row, column] = bad
        for fit in ("minmax", "mse"):
            with pytest.raises(ValueError, match="the weight has NaN or infinite values"):
                scheme.quantize(weight, fit)


def test_a_scale_beyond_bfloat16_is_refused_with_the_usual_error(level):
    # finite as float32, but rounded to infinity
    with pytest.raises(ValueError, match="NaN or infinite"):
        make_scheme("nf4").quantize(torch.full((2, 64), torch.finfo(torch.float32).max), "absmax")


VIEWS = {
    "transposed": lambda: torch.randn(200, 20).T,
    "columns": lambda: torch.randn(20, 300)[:, 50:250],
    "every-second-row": lambda: torch.randn(40, 200)[::2],
    "every-second-column": lambda: torch.randn(20, 400)[:, ::2],
    "expanded": lambda: torch.randn(1, 200).expand(20, 200),
    "negative-bit": lambda: torch._neg_view(torch.randn(20, 200)),
    "float64": lambda: torch.randn(20, 200, dtype=torch.float64),
    "three-dimensions": lambda: torch.randn(3, 7, 200),
    "one-column": lambda: torch.randn(20, 4)[:, 1:2],
    "empty": lambda: torch.randn(0, 5),
    "parameter": lambda: torch.nn.Parameter(torch.randn(20, 200)),
}


@pytest.mark.parametrize("make", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_every_way_a_weight_lies_in_memory(name, make, both, monkeypatch):
    monkeypatch.setattr(module, "COPIED_VALUES", 1000)
    for made, expected in both(make_scheme(name), make(), "minmax"):
        assert_same(made, expected)


def test_a_fit_with_other_numbers_is_followed(both):
    weight = torch.randn(32, 256) * 2
    scheme = make_scheme("int2")
    results = []
    for fit in (Hqq(), Hqq(p=0.4, beta=1.0, kappa=1.1, iterations=7), Hqq(iterations=0)):
        for made, expected in both(scheme, weight, fit):
            for name in ("scale", "zero"):
                assert made[name].float().sub(expected[name].float()).abs().mean() < 1e-3
        results.append(made)
    assert not torch.equal(results[0]["zero"], results[1]["zero"])


def test_a_fit_of_a_users_own_is_asked(monkeypatch):
    class Mine(Mse):
        def __call__(self, values, grid, dtype):
            return torch.full((values.shape[0], 1), 2.0), None

    assert native_fit(Mine(), Grid(QTYPES["int8"])) is None
    assert (make_scheme("int8").quantize(torch.randn(4, 64), Mine())["scale"] == 2).all()


@pytest.mark.parametrize(
    "fit, symmetric", [("absmax", False), ("hqq", True)], ids=["absmax-asymmetric", "hqq-symmetric"]
)
def test_a_fit_that_refuses_the_grid_still_says_so(fit, symmetric):
    assert native_fit(fit_by_name(fit), Grid(QTYPES["int4"], symmetric)) is None
    with pytest.raises(ValueError, match=f"fit='{fit}'"):
        make_scheme("int4", symmetric=symmetric).quantize(torch.randn(4, 64), fit)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_the_table_has_the_nearest_number_of_every_cell(name):
    numbers, codes = lookup_tables(QTYPES[name], torch.device("cpu"))
    table, cells = native_table(QTYPES[name]), torch.arange(CELLS)
    stretches = table[:128].view(8, 16)[:, cells // 4096]
    which = (cells >= stretches[:2]).sum(0)
    assert torch.equal(stretches[2:5].gather(0, which[None])[0], numbers)
    assert torch.equal(stretches[5:8].gather(0, which[None])[0], codes.float())


def test_what_is_not_taken_says_why(monkeypatch):
    rows, out, recipe = quantize_op.samples(0)[0]
    kernel = quantize_op.kernels[0]
    assert kernel.refuses(rows, out, recipe) is None
    assert "16" in kernel.refuses(rows, out._replace(group_size=24), recipe)
    assert "CPU" in kernel.refuses(rows.to("meta"), out.map(lambda tensor: tensor.to("meta")), recipe)
    assert "plain" in kernel.refuses(torch.nn.Parameter(rows), out, recipe)
    assert "fit" in kernel.refuses(rows, out, replace(recipe, native=None))
    # a number type that C++ does not know is quantized in torch
    monkeypatch.setitem(QTYPES, "int8", replace(QTYPES["int8"], native=None))
    assert "int8" in kernel.refuses(rows, out, recipe)
    assert dict(quantize_op.explain(rows, out, recipe))["reference"] == "runs"
    monkeypatch.undo()
    monkeypatch.setenv("QUANTO_HF_REFERENCE", "1")
    assert dict(quantize_op.explain(rows, out, recipe))["native"] == "QUANTO_HF_REFERENCE is set"
    monkeypatch.setattr(module, "NATIVE", None)
    assert kernel.refuses(rows, out, recipe) == module.REASON


def test_a_number_type_without_native_code_is_multiplied_in_torch(monkeypatch):
    scheme = make_scheme("int4")
    weight, x = scheme.weight(scheme.quantize(torch.randn(8, 96)), 96), torch.randn(3, 96)
    expected = linear(x, weight)
    monkeypatch.setitem(QTYPES, "int4", replace(QTYPES["int4"], native=None))
    assert dict(linear_op.explain(x, weight, None)) == {
        "native": "there is no native code for int4 weights",
        "torch_int8pack": "it multiplies symmetric per-channel int8 weights only",
        "torch_blocks": "runs",
        "reference": "a kernel before it runs",
    }
    assert linear_op.bind(weight) is None
    torch.testing.assert_close(linear(x, weight), expected, rtol=1e-4, atol=1e-4)
