"""The grid: the nearest number, and its code, against a search through all numbers of the type."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quanto_hf.fit.grid import CELLS, Grid
from quanto_hf.ops import pack
from quanto_hf.ops.decode import decode_reference
from quanto_hf.qtypes import QTYPES

GRIDS = {kind.name: Grid(kind) for kind in QTYPES.values()}
GRIDS |= {f"{name}-asym": Grid(QTYPES[name], symmetric=False) for name in ("int2", "int4")}
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
# around the grids, where the borders between two numbers are
values = st.lists(floats | st.floats(-20, 20, width=32) | st.floats(-1, 1, width=32), min_size=1, max_size=40)


def numbers(grid: Grid) -> torch.Tensor:
    """All numbers of a grid, in float64, without NaN and infinity."""
    if grid.qtype.kind == "int":
        return torch.arange(grid.lowest, grid.highest + 1, dtype=torch.float64)
    codes = torch.arange(grid.qtype.levels, dtype=torch.uint8)[None]
    found = decode_reference(pack(codes, grid.qtype.bits), grid.qtype, grid.qtype.levels)[0].double()
    return found[found.isfinite()]


def decoded(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """What stored codes stand for on the grid."""
    found = decode_reference(pack(codes[None], grid.qtype.bits), grid.qtype, codes.numel())[0]
    return found + grid.lowest if grid.qtype.is_packed and grid.qtype.kind == "int" else found


@every_grid
def test_the_ends_of_the_grid_are_its_smallest_and_largest_number(grid: Grid):
    assert (numbers(grid).min(), numbers(grid).max()) == (grid.lowest, grid.highest)


@every_grid
@given(u=values)
@settings(max_examples=60, deadline=None)
def test_no_number_of_the_grid_is_nearer_than_the_one_found(grid: Grid, u: list[float]):
    value = torch.tensor(u)
    found = grid.nearest_(value.clone()).double()
    distances = (value.double()[:, None] - numbers(grid)).abs()
    # a table is searched in cells; a value at a border may be one half cell away from where it is looked up
    slack = (grid.highest - grid.lowest) / (CELLS - 1) if grid.qtype.kind == "table" else 0.0
    assert ((found - value.double()).abs() <= distances.amin(1) + slack).all()
    assert torch.isin(found, numbers(grid)).all()


@every_grid
@given(u=values)
@settings(max_examples=60, deadline=None)
def test_the_code_stands_for_the_nearest_number(grid: Grid, u: list[float]):
    value = torch.tensor(u)
    codes = grid.encode(value.clone(), torch.empty(len(u), dtype=grid.qtype.storage))
    assert torch.equal(decoded(codes, grid), grid.nearest_(value.clone()))


@every_grid
def test_every_number_of_the_grid_is_nearest_to_itself(grid: Grid):
    exact = numbers(grid).float()
    assert torch.equal(grid.nearest_(exact.clone()), exact)


@every_grid
def test_zero_stays_zero(grid: Grid):
    codes = grid.encode(torch.zeros(5), torch.empty(5, dtype=grid.qtype.storage))
    assert not decoded(codes, grid).any()


@every_grid
def test_what_lies_beyond_the_grid_becomes_its_end(grid: Grid):
    far = torch.tensor([-torch.inf, -3e38, 3e38, torch.inf])
    assert grid.nearest_(far).tolist() == [grid.lowest, grid.lowest, grid.highest, grid.highest]


@every_grid
def test_a_value_that_is_no_number_is_no_crash(grid: Grid):
    # a fit meets NaN before anybody has looked at the scale: as an index it would be out of range
    assert grid.nearest_(torch.full((3, 5), torch.nan)).shape == (3, 5)


@every_grid
def test_codes_can_be_written_into_a_part_of_a_larger_tensor(grid: Grid):
    values = torch.randn(3, 10) * 3
    whole = torch.zeros(3, 30, dtype=grid.qtype.storage)
    grid.encode(values.clone(), whole[:, 10:20])
    assert torch.equal(whole[:, 10:20], grid.encode(values, torch.empty(3, 10, dtype=grid.qtype.storage)))
    assert not whole[:, :10].any() and not whole[:, 20:].any()
