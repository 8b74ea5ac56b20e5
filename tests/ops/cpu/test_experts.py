"""The native kernel of ``expert_linear``: the bits of ``linear`` on each expert, for any order of ids, any threads."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_weights import FLOATS, LEVELS, Kind, every_float, make_weight, native, needs_native

from quanto_hf.ops import GroupedWeight, expert_linear, expert_linear_op
from quanto_hf.ops.cpu import call
from quanto_hf.ops.cpu.library import NATIVE
from quanto_hf.ops.registry import why_kernel_wrong

pytestmark = needs_native

KINDS = [Kind("int8", -1), Kind("int8", 32), Kind("int4", 64, True), Kind("int2", 96, True), Kind("float8_e4m3fn", -1),
         Kind("nf4", 32)]  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
EXPERTS = 4
ROWS = (1, 2, 7, 8, 33, 90)
ORDERS = ("any", "sorted", "one", "odd")


def case(kind: Kind, ids: torch.Tensor, dtype: torch.dtype, n: int = 33, k: int = 200) -> tuple[Any, ...]:
    """Arguments of the op, with a bias where the number of rows is odd."""
    each = [make_weight(kind, n, k, seed=i) for i in range(EXPERTS)]
    zero = torch.stack([w.offset() for w in each]) if kind.asymmetric else None
    packed, scale = torch.stack([w.packed for w in each]), torch.stack([w.scale for w in each])
    weight = GroupedWeight(packed, scale, zero, kind.qtype, kind.group_size, k)
    x = torch.randn(len(ids), k).to(dtype)
    bias = torch.randn(EXPERTS, n).to(dtype) if len(ids) % 2 else None
    return (x, ids, weight, bias)


def one_by_one(args: tuple[Any, ...]) -> torch.Tensor:
    """What native ``linear`` gives for the rows of each expert."""
    x, ids, weight, bias = args
    out = x.new_empty(len(x), weight.shape[1])
    for e in ids.unique().tolist():
        out[ids == e] = native()(x[ids == e], weight.rows(e), None if bias is None else bias[e])
    return out


@every_kind
@every_float
def test_each_row_has_the_bits_of_linear_on_its_expert(level: str, kind: Kind, dtype: torch.dtype):
    # Two of the four orders for each number of rows, so that over kinds and dtypes each number meets all orders.
    first = KINDS.index(kind) + list(FLOATS.values()).index(dtype) + LEVELS.index(level)
    for turn, m in enumerate(ROWS, first):
        ids = torch.randint(0, EXPERTS, (m,))
        for order in (ORDERS[turn % 4], ORDERS[(turn + 1) % 4]):
            args = case(
                kind, {"any": ids, "sorted": ids.sort().values, "one": ids * 0 + 3, "odd": ids | 1}[order], dtype
            )
            assert torch.equal(native(expert_linear_op)(*args), one_by_one(args)), f"{m} rows, {order}"


# as many as are copied at a time, and one more and less; the last part may be of few rows
@pytest.mark.parametrize("m", [511, 512, 513, 1030])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_many_rows_of_an_expert_are_copied_in_parts(level: str, dtype: torch.dtype, m: int):
    ids = torch.zeros(m + 2, dtype=torch.int64)
    ids[3], ids[77] = 1, 2  # those of expert 0 do not lie side by side
    args = case(KINDS[2], ids, dtype)
    x, _, weight, bias = args
    made, mine = native(expert_linear_op)(*args), ids == 0
    first = None if bias is None else bias[0]
    parts = [native()(part, weight.rows(0), first) for part in x[mine].split(512)]
    assert torch.equal(made[mine], torch.cat(parts))


@every_kind
@every_float
def test_results_do_not_depend_on_the_number_of_threads(level: str, kind: Kind, dtype: torch.dtype):
    for m in (1, 7, 90):
        args, made = case(kind, torch.randint(0, EXPERTS, (m,)), dtype, 200), []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            made.append(native(expert_linear_op)(*args))
        assert all(torch.equal(made[0], other) for other in made[1:]), f"{m} rows"


def test_python_threads_may_call_at_once(level: str):
    cases = [case(kind, torch.randint(0, EXPERTS, (m,)), torch.bfloat16) for kind in KINDS for m in (1, 7, 60)]
    expected = [native(expert_linear_op)(*args) for args in cases]

    def run(start: int) -> bool:
        order = [(start * 7 + i) % len(cases) for i in range(len(cases))]
        return all(torch.equal(native(expert_linear_op)(*cases[i]), expected[i]) for i in order)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(run, range(12)))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(KINDS),
    st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=80),
    st.integers(1, 70),
    st.integers(1, 400),
    st.sampled_from(list(FLOATS.values())),
    st.sampled_from(LEVELS or ["none"]),
)
def test_whatever_the_ids_are(kind: Kind, ids: list[int], n: int, k: int, dtype: torch.dtype, name: str):
    before = NATIVE.level()
    NATIVE.use_level(name)
    try:
        args = case(kind, torch.tensor(ids), dtype, n, k)
        assert torch.equal(native(expert_linear_op)(*args), one_by_one(args))
    finally:
        NATIVE.use_level(before)


def test_the_library_refuses_an_id_that_python_did_not_see(level: str):
    args = case(KINDS[0], torch.tensor([0, EXPERTS, 1]), torch.float32)
    with pytest.raises(IndexError, match="an expert id is not one of 0 to 3"):
        call.native_expert_linear(*args)


def test_an_empty_batch_has_nothing_to_multiply(level: str):
    args = case(KINDS[0], torch.empty(0, dtype=torch.int64), torch.float32)
    assert expert_linear_op.kernels[0].refuses(*args) == "there is nothing to multiply"
    assert expert_linear(*args).shape == (0, 33)


@pytest.fixture
def _nothing_is_known():
    why_kernel_wrong.cache_clear()
    yield
    why_kernel_wrong.cache_clear()


@pytest.mark.usefixtures("_nothing_is_known")
def test_a_library_that_mixes_experts_up_is_reported_once_and_never_used(level: str, monkeypatch):
    right, zeros = NATIVE.expert_linear, torch.zeros(1000, dtype=torch.int64)
    monkeypatch.setattr(NATIVE, "expert_linear", lambda *args: right(*args[:-2], zeros.data_ptr(), args[-1]))
    args = case(KINDS[2], torch.tensor([0, 3, 1]), torch.float32)
    with pytest.warns(RuntimeWarning) as caught:
        for _ in range(2):
            torch.testing.assert_close(expert_linear(*args), expert_linear_op.reference(*args), rtol=1e-4, atol=1e-4)
    (warning,) = caught
    assert f"{level} kernel for experts disagrees with the reference" in str(warning.message)
    assert dict(expert_linear_op.explain(*args))["each_expert"] == "runs"


@pytest.mark.usefixtures("_nothing_is_known")
def test_no_library_mixes_experts_up_on_this_machine(level: str):
    kernel = expert_linear_op.kernels[0]
    for kind in KINDS:
        for dtype in FLOATS.values():
            args = case(kind, torch.tensor([0, 3, 1]), dtype)
            assert expert_linear_op.why_wrong(kernel, expert_linear_op.case(*args)) is None
