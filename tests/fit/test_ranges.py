"""What every fit promises, and the two that keep the whole range: absmax and minmax."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quanto_hf.fit import (
    BFLOAT16,
    FITS,
    FLOAT32,
    Absmax,
    AbsmaxOptimizer,
    Fit,
    HqqOptimizer,
    MaxOptimizer,
    Minmax,
    ScaleType,
    fit_by_name,
)
from quanto_hf.fit.base import stored_scale
from quanto_hf.fit.grid import Grid
from quanto_hf.qtypes import QTYPES

SYMMETRIC = {kind.name: Grid(kind) for kind in QTYPES.values()}
ASYMMETRIC = {f"{name}-asym": Grid(QTYPES[name], symmetric=False) for name in ("int2", "int4")}
# every fit on every grid that it serves
PAIRS = {
    f"{name}-{label}": (fit, grid)
    for name, fit in FITS.items()
    for label, grid in {**SYMMETRIC, **ASYMMETRIC}.items()
    if not (name == "absmax" and grid.has_zero) and not (name == "hqq" and not grid.has_zero)
}
every_fit = pytest.mark.parametrize("fit, grid", PAIRS.values(), ids=PAIRS)
dtypes = pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=["scale32", "scale16"])

UNIT_ROUNDOFF = {FLOAT32: 2**-24, BFLOAT16: 2**-8}
# half the distance of two subnormal numbers: below the smallest normal number the roundoff is absolute
HALF_SUBNORMAL = {FLOAT32: 2**-150, BFLOAT16: 2**-134}

# one size for a whole group, so that groups are far from 1 as well as near
groups_of_values = st.tuples(
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=24), st.floats(1e-12, 1e12), st.floats(-3, 3)
).map(lambda g: torch.tensor(g[0], dtype=torch.float64).add(g[2]).mul(g[1]).float()[None])


def in_grid_units(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    return values / scale if zero is None else values / scale + zero


def rounded(values: torch.Tensor, grid: Grid, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """The values as they are after quantization, in float64."""
    numbers = grid.nearest_(in_grid_units(values, scale, zero)).double()
    return (numbers if zero is None else numbers - zero.double()) * scale.double()


def roundoff(scale: torch.Tensor, dtype: ScaleType) -> torch.Tensor:
    """The share of itself by which storing a scale in a dtype changes it at most."""
    return (HALF_SUBNORMAL[dtype] / scale.double().abs()).clamp(min=UNIT_ROUNDOFF[dtype])


@every_fit
@dtypes
@given(values=groups_of_values)
@settings(max_examples=15, deadline=None)
def test_scale_and_zero_are_exact_in_the_dtype_in_which_they_are_stored(fit, grid, dtype, values):
    scale, zero = fit(values, grid, dtype)
    assert scale.shape == (1, 1) and scale.dtype == torch.float32
    assert torch.equal(scale, scale.to(dtype.dtype).float()) and scale.isfinite().all() and scale.all()
    assert (zero is not None) == grid.has_zero
    if zero is not None:
        assert zero.shape == (1, 1) and torch.equal(zero, zero.to(dtype.dtype).float()) and zero.isfinite().all()


@every_fit
@dtypes
def test_a_group_of_zeros_stays_zero(fit: Fit, grid: Grid, dtype: ScaleType):
    values = torch.zeros(3, 16)
    values[1] = torch.randn(16)
    made = rounded(values, grid, *fit(values, grid, dtype))
    assert not made[0].any() and not made[2].any() and made[1].any()


@every_fit
@dtypes
def test_a_group_of_one_repeated_value_is_as_exact_as_its_scale(fit, grid, dtype):
    for value in (1.0, -1.0, 0.375, -1.5e-5, 65536.0):
        values = torch.full((2, 16), value)
        made = rounded(values, grid, *fit(values, grid, dtype))
        # The scale is rounded to its dtype; the division and the product in float32 add one rounding each. bfloat16
        # holds these values, so that a grid with a power of two or a zero has nothing to round.
        exact = grid.has_zero or grid.qtype.name in ("int2", "int4", "nf4")
        tolerance = 0.0 if exact and value != -1.5e-5 else UNIT_ROUNDOFF[dtype] + 3 * 2**-24
        assert ((made - value).abs() <= tolerance * abs(value)).all(), value


@every_fit
def test_only_the_scale_of_a_group_with_a_value_that_is_not_finite_is_not_finite(fit, grid):
    for bad in (torch.nan, torch.inf, -torch.inf):
        values = torch.randn(3, 16)
        values[1, 5] = bad
        scale, _ = fit(values, grid, BFLOAT16)
        assert scale.isfinite().flatten().tolist() == [True, False, True], bad


@every_fit
def test_the_values_are_not_changed_and_groups_do_not_touch_each_other(fit: Fit, grid: Grid):
    values = torch.randn(6, 32) * torch.logspace(-3, 3, 6)[:, None]
    kept = values.clone()
    scale, zero = fit(values, grid, BFLOAT16)
    assert torch.equal(values, kept)
    for i in range(6):
        one_scale, one_zero = fit(values[i : i + 1], grid, BFLOAT16)
        assert torch.equal(one_scale, scale[i : i + 1])
        assert zero is None or torch.equal(one_zero, zero[i : i + 1])


# ---------------------------------------------------------------------------------------------------- whole ranges


@pytest.mark.parametrize("grid", [g for g in SYMMETRIC.values() if g.qtype.kind == "int"], ids=lambda g: g.qtype.name)
@dtypes
@given(values=groups_of_values)
@example(values=torch.tensor([[3.1738e-37]]))  # its scale is subnormal
@settings(max_examples=100, deadline=None)
def test_absmax_is_off_by_half_a_step_inside_the_grid_and_by_one_step_at_most(grid, dtype, values):
    scale, _ = Absmax()(values, grid, dtype)
    u = values.double() / scale.double()
    # in steps; float32 rounds u once, by a share of its size
    error = (rounded(values, grid, scale, None) / scale.double() - u).abs()
    rounding = u.abs() * 2**-24
    inside = (u >= grid.lowest) & (u <= grid.highest)
    assert (error <= 0.5 + rounding)[inside].all()
    # The far end of int4 lies one step nearer than the near one. A scale that was rounded down leaves the largest
    # value outside by the rounding.
    short = -grid.lowest - grid.highest
    assert (error <= max(short, 0.5) + rounding + u.abs() * roundoff(scale, dtype)).all()


@pytest.mark.parametrize("grid", ASYMMETRIC.values(), ids=ASYMMETRIC)
@dtypes
@given(values=groups_of_values)
@settings(max_examples=100, deadline=None)
def test_minmax_is_off_by_half_a_step_and_what_its_zero_was_rounded_by(grid, dtype, values):
    scale, zero = Minmax()(values, grid, dtype)
    u = values.double() / scale.double() + zero.double()
    error = ((rounded(values, grid, scale, zero) - values.double()) / scale.double()).abs()
    # float32 rounds the quotient and the sum, which are up to |zero| + levels in size
    rounding = 2 * 2**-24 * (zero.abs().double() + grid.highest + 1)
    inside = (u >= grid.lowest) & (u <= grid.highest)
    assert (error <= 0.5 + rounding)[inside].all()
    # Outside lies what the rounding moved there: of the scale, which makes the range shorter on both sides, and of
    # the zero, which shifts it.
    moved = roundoff(scale, dtype) * (zero.abs().double() + grid.highest + 1)
    assert (error <= 0.5 + moved + rounding).all()


@pytest.mark.parametrize("qtype", ["int2", "int4"])
def test_the_value_of_largest_magnitude_is_put_on_the_long_side_of_the_grid(qtype: str):
    grid = SYMMETRIC[qtype]
    for sign in (1.0, -1.0):
        values = sign * torch.tensor([[1.0, -0.5, 0.25]])
        scale, _ = Absmax()(values, grid, FLOAT32)
        assert (values / scale)[0, 0] == grid.lowest


def test_the_ends_of_the_range_of_minmax_are_the_ends_of_the_grid():
    values = torch.tensor([[-1.0, 0.3, 2.0]])
    scale, zero = Minmax()(values, ASYMMETRIC["int4-asym"], FLOAT32)
    assert in_grid_units(values, scale, zero)[0, [0, 2]].tolist() == pytest.approx([0.0, 15.0], abs=1e-5)


def test_minmax_on_a_symmetric_grid_is_absmax():
    values = torch.randn(4, 32)
    for grid in SYMMETRIC.values():
        assert torch.equal(Minmax()(values, grid, FLOAT32)[0], Absmax()(values, grid, FLOAT32)[0])


def test_a_range_wider_than_the_largest_float_does_not_overflow():
    values = torch.tensor([[-3e38, 3e38]])
    scale, zero = Minmax()(values, ASYMMETRIC["int4-asym"], BFLOAT16)
    assert scale.isfinite().all() and zero.isfinite().all()


def test_a_scale_too_small_for_its_dtype_becomes_one():
    assert stored_scale(torch.tensor([1e-9, 0.0, 0.5]), ScaleType("float16", torch.float16)).tolist() == [1.0, 1.0, 0.5]


def test_absmax_refuses_a_grid_with_a_zero_and_names_what_works():
    with pytest.raises(ValueError, match=r"absmax.*symmetric=True.*minmax"):
        Absmax()(torch.randn(1, 4), ASYMMETRIC["int4-asym"], FLOAT32)


def test_a_fit_is_found_by_its_name_and_by_itself():
    for name, fit in FITS.items():
        assert fit_by_name(name) is fit and fit_by_name(fit) is fit
    assert (AbsmaxOptimizer, MaxOptimizer, HqqOptimizer) == tuple(type(FITS[n]) for n in ("absmax", "minmax", "hqq"))


def test_another_fit_is_an_error_that_says_what_came_and_what_is_allowed():
    with pytest.raises(ValueError, match="fit='best' is not known; choose one of absmax, hqq, minmax, mse"):
        fit_by_name("best")
