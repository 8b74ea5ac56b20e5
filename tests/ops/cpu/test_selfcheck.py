"""A kernel that is wrong on this machine is reported once, never used, and the result is right all the same."""

import warnings
from typing import Any

import pytest
import torch
from native_weights import FLOATS, LEVELS, Exact, Kind, make_weight, needs_native

from quanto_hf.ops import GroupedWeight, dequantize, dequantize_op, linear, linear_op
from quanto_hf.ops.cpu.library import NATIVE
from quanto_hf.ops.registry import why_kernel_wrong
from quanto_hf.ops.selfcheck import FEW_ROWS
from quanto_hf.qtypes import QTYPES

pytestmark = needs_native

KINDS = [Kind("int8", -1), Kind("int4", 64, True), Kind("float8_e5m2", -1), Kind("nf4", 32)]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
# Where ``linear`` is told how many rows x has: csrc/module.cpp.
ROWS = 12


@pytest.fixture(autouse=True)
def _nothing_is_known():
    why_kernel_wrong.cache_clear()
    yield
    why_kernel_wrong.cache_clear()


@pytest.fixture
def wrong(monkeypatch):
    """``wrong(name)`` makes a native function take codes for their neighbours; only for x of ``rows`` rows if given."""

    def spoil(name: str, rows: int | None = None) -> None:
        right = getattr(NATIVE, name)

        def spoiled(packed: int, *rest: int) -> Any:
            return right(packed + (rows in (None, rest[ROWS - 1])), *rest)

        monkeypatch.setattr(NATIVE, name, spoiled)

    return spoil


def case(kind: Kind, m: int = 3) -> tuple[tuple[Any, ...], Exact]:
    weight = make_weight(kind, 17, 200)
    x = torch.randn(m, 200)
    return weight.linear(x), Exact.of(x, weight)


@every_kind
@pytest.mark.parametrize("m", [1, 3, 20])
def test_a_wrong_kernel_is_reported_once_and_never_used(level: str, kind: Kind, m: int, wrong):
    args, exact = case(kind, m)
    wrong("linear")
    with pytest.warns(RuntimeWarning) as caught:
        exact.check(linear(*args))
        exact.check(linear(*args))
    (warning,) = caught
    said = str(warning.message)
    for part in (level, kind.qtype, "disagrees with the reference", "slower kernels are used", "report", "quanto-hf"):
        assert part in said
    # the prepared call asks the same
    assert linear_op.bind(args[1])(args[0], None) is None


@every_kind
def test_explain_gives_the_sentence(level: str, kind: Kind, wrong):
    args, _ = case(kind)
    wrong("linear")
    with pytest.warns(RuntimeWarning):
        rows = dict(linear_op.explain(*args))
    assert "disagrees with the reference" in rows["native"] and kind.qtype in rows["native"]
    assert rows["torch_blocks"] == "runs"
    assert not warned(lambda: linear_op.explain(*args))


def warned(run) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return caught


@every_kind
def test_a_wrong_dequantize_is_found_too(level: str, kind: Kind, wrong):
    args = (*make_weight(kind, 17, 200).rest(), torch.float32)
    wrong("dequantize")
    with pytest.warns(RuntimeWarning, match="disagrees"):
        made = dequantize(*args)
    torch.testing.assert_close(made, dequantize_op.reference(*args))


def test_only_the_calls_that_are_wrong_are_slower(level: str, wrong):
    few, exact_few = case(Kind("int4", 64, True), 3)
    many, exact_many = case(Kind("int4", 64, True), 20)
    wrong("linear", rows=2 * FEW_ROWS + 3)
    assert not warned(lambda: exact_few.check(linear(*few)))
    with pytest.warns(RuntimeWarning):
        exact_many.check(linear(*many))
    assert dict(linear_op.explain(*few))["native"] == "runs"


def test_a_kernel_that_is_wrong_for_one_row_only_is_found(level: str, wrong):
    # one row and two have kernels of their own
    args, exact = case(Kind("int4", 64, True), 1)
    wrong("linear", rows=1)
    with pytest.warns(RuntimeWarning):
        exact.check(linear(*args))


@pytest.mark.parametrize("qtype", QTYPES)
def test_no_kernel_is_wrong_on_this_machine(level: str, qtype: str):
    for dtype in FLOATS.values():
        for group_size in (-1, 32, 64, 100, 128):
            for many in (False, True):
                key = (GroupedWeight, qtype, group_size, False, torch.bfloat16)
                assert linear_op.why_wrong(linear_op.kernels[0], (key, dtype, many)) is None


@pytest.mark.parametrize("qtype", QTYPES)
def test_the_sample_has_every_kind_of_code(qtype: str):
    numbers = GroupedWeight.random((GroupedWeight, qtype, -1, False, torch.float32)).dense(torch.float32)
    assert numbers.isfinite().all()
    assert (numbers > 0).any() and (numbers < 0).any()


def test_results_are_kept_for_each_level():
    before = NATIVE.level()
    try:
        for name in LEVELS:
            NATIVE.use_level(name)
            linear(*case(Kind("int4", 64, True))[0])
    finally:
        NATIVE.use_level(before)
    assert why_kernel_wrong.cache_info().currsize == len(LEVELS)
