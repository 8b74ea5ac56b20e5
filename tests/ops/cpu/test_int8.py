"""Products with int8 activations: what the native kernels compute is the rounding that is promised, exactly."""

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from native_weights import FLOATS, Kind, Weight, each_level, every_float, make_weight, needs_native

from quanto_hf.nn import QLinear
from quanto_hf.nn.bound_call import BoundCall
from quanto_hf.ops import ACTIVATION_GROUP, linear_rounded_op, round_activations
from quanto_hf.ops.cpu.call import linear_name, native_linear
from quanto_hf.ops.cpu.library import NATIVE
from quanto_hf.ops.cpu.products import refuses_int8
from quanto_hf.ops.registry import why_kernel_wrong
from quanto_hf.ops.selfcheck import TOLERANCE
from quanto_hf.qtypes import qint8
from quanto_hf.schemes import make_scheme

pytestmark = needs_native

INT8 = Kind("int8", -1)
GROUPED = [
    Kind(qtype, group, asymmetric)
    for qtype, group in [
        ("int4", 16),
        ("int4", 64),
        ("int4", 96),
        ("int4", -1),
        ("int2", 32),
        ("int2", 48),
        ("int2", 256),
    ]
    for asymmetric in (False, True)
]
KINDS = [INT8, *GROUPED]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
some_kinds = pytest.mark.parametrize(
    "kind", [INT8, Kind("int4", 64), Kind("int4", 16, True), Kind("int2", -1, True)], ids=str
)
# the first and the last number of rows of each kernel
BATCHES = [1, 2, 3, 8, 9, 17, 127]
# both sides of the borders of groups and blocks of codes
COLUMNS = [1, 13, 33, 127, 129, 200, 255, 257, 513, 1000]


def run(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, x_scale: torch.Tensor | None = None
) -> torch.Tensor:
    skip_without(weight.kind)
    return native_linear(x, *weight.rest(), bias, activations="int8", x_scale=x_scale)


def has_kernel(kind: Kind) -> bool:
    return bool(NATIVE.has_kernel(linear_name(*of_kind(kind), "int8")))


@cache
def of_kind(kind: Kind) -> tuple[Any, ...]:
    """Some weight of a kind."""
    return make_weight(kind, 1, 64).rest()


def skip_without(kind: Kind) -> None:
    if not has_kernel(kind):
        pytest.skip(f"level {NATIVE.level()} has no product of {kind.qtype} and int8")


def each_level_with(kind: Kind) -> Iterator[str]:
    """Each level that has a kernel for such weights, in use; without any the test is skipped."""
    served = 0
    for level in each_level():
        if has_kernel(kind):
            served += 1
            yield level
    if not served:
        pytest.skip(f"no level has a product of {kind.qtype} and int8")


def rounded(x: torch.Tensor, kind: Kind, x_scale: torch.Tensor | None = None) -> torch.Tensor:
    """x as it is multiplied, written plainly: steps of absmax / 127 of a row, or of each 32 columns of it, or given."""
    width = x.shape[1] if kind == INT8 else ACTIVATION_GROUP
    parts = []
    for part in x.float().split(width, 1):
        step = part.abs().amax(1, keepdim=True) / 127 if x_scale is None else x_scale.clone()
        step[step == 0] = 1
        parts.append((part / step).round().clamp(-127, 127).double() * step.double())
    return torch.cat(parts, 1)


def exactly(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, x_scale: torch.Tensor | None = None
) -> Callable[[torch.Tensor], None]:
    """What checks a product. The sums of integers are exact; those of their multiples are float32, a group or more at a
    time; the result is rounded to the dtype of x."""
    multiplied = rounded(x, weight.kind, x_scale)
    value, wide = multiplied @ weight.dense().T, multiplied.abs() @ weight.wide().T
    if bias is not None:
        value, wide = value + bias.double(), wide + bias.double().abs()
    slack = (8 + x.shape[1] ** 0.5) * 2**-24 * wide + 1e-38
    if x.dtype is not torch.float32:
        slack = slack + torch.finfo(x.dtype).eps / 2 * value.abs() + (2**-25 if x.dtype is torch.float16 else 0)

    def check(made: torch.Tensor) -> None:
        assert made.shape == value.shape and made.dtype == x.dtype
        assert ((made.double() - value).abs() <= slack).all()

    return check


def check_each_level(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, x_scale: torch.Tensor | None = None
) -> None:
    check = exactly(x, weight, bias, x_scale)
    for _level in each_level_with(weight.kind):
        check(run(x, weight, bias, x_scale))


@every_kind
@every_float
def test_the_product_of_rounded_rows_is_exact(dtype: torch.dtype, kind: Kind):
    # Four of the ten lengths for each combination, so that over the dtypes each kind meets every length.
    first = KINDS.index(kind) + 3 * list(FLOATS.values()).index(dtype)
    for columns in (COLUMNS[(first + step) % 10] for step in range(4)):
        weight, bias = make_weight(kind, 45, columns), torch.randn(45).to(dtype)
        for batch in BATCHES:
            x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch)).to(dtype)
            check_each_level(x, weight, bias)


@some_kinds
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33, 96, 97, 300])
def test_any_number_of_rows_of_the_weight(rows: int, kind: Kind):
    weight = make_weight(kind, rows, 300)
    for batch in (1, 2, 5, 40):
        check_each_level(torch.randn(batch, 300).bfloat16(), weight)


@some_kinds
def test_more_rows_of_x_than_a_kernel_takes_at_a_time(kind: Kind):
    check_each_level(torch.randn(1100, 700), make_weight(kind, 33, 700))


@some_kinds
@pytest.mark.parametrize("size", [1e36, 1e20, 1e-20, 1e-36])
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_sizes_at_the_ends_of_float32(batch: int, size: float, kind: Kind):
    # a token among others of another size; results stay within float32
    weight, x = make_weight(kind, 33, 300, size=1e-2), torch.randn(batch, 300)
    x[0] *= size
    check_each_level(x, weight)


@pytest.mark.parametrize("batch", [1, 3, 20])
def test_sums_may_be_larger_than_float32_where_the_scale_brings_them_back(batch: int):
    weight, x = make_weight(Kind("int4", 64, True), 33, 300, size=1e-6), torch.randn(batch, 300).clamp(-3, 3) * 1e38
    check = exactly(x, weight)
    for _level in each_level_with(weight.kind):
        made = run(x, weight)
        assert made.isfinite().all()
        check(made)


@some_kinds
@pytest.mark.parametrize("batch", [3, 20])
def test_a_row_of_zeros_gives_the_bias_and_a_row_with_nan_or_infinity_gives_nan(batch: int, kind: Kind):
    weight, bias = make_weight(kind, 40, 100), torch.randn(40)
    x = torch.randn(batch, 100)
    x[0] = 0
    x[1, 7], x[2, 99] = torch.nan, -torch.inf
    for _level in each_level_with(kind):
        got = run(x, weight, bias)
        assert torch.equal(got[0], bias)
        assert got[1:3].isnan().all() and got[3:].isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["scale", "zero"])
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_a_scale_or_zero_that_is_no_number_spoils_its_row_of_the_weight_only(batch: int, which: str, bad: float):
    weight = make_weight(Kind("int4", 32, True), 40, 100)
    getattr(weight, which)[17, 2] = bad
    x = torch.randn(batch, 100)
    for _level in each_level_with(weight.kind):
        got = run(x, weight)
        assert not got[:, 17].isfinite().any()
        got[:, 17] = 0
        assert got.isfinite().all()


@some_kinds
@pytest.mark.parametrize("x_scale", [None, 0.01], ids=["own scales", "a given scale"])
def test_threads_do_not_change_a_bit(level: str, kind: Kind, x_scale: float | None):
    weight = make_weight(kind, 333, 500)
    before = torch.get_num_threads()
    try:
        for batch in (1, 2, 8, 40):
            x = torch.randn(batch, 500).bfloat16()
            results = []
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                results.append(run(x, weight, x_scale=None if x_scale is None else torch.tensor(x_scale)))
            assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------- a given scale


@every_kind
@every_float
@pytest.mark.parametrize("columns", [33, 600])
def test_a_given_scale_serves_every_row(columns: int, dtype: torch.dtype, kind: Kind):
    # rows of three sizes: all are 0, some are cut to 127 steps, most are
    weight, bias, x_scale = make_weight(kind, 45, columns), torch.randn(45).to(dtype), torch.tensor([0.02])
    for batch in BATCHES:
        x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch))
        x = (x * torch.tensor([2.0, 1e-3, 100.0]).repeat(batch)[:batch, None]).to(dtype)
        check_each_level(x, weight, bias, x_scale)


@some_kinds
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_halves_of_a_given_step_go_to_even_numbers(batch: int, kind: Kind):
    weight, x_scale = make_weight(kind, 33, 80), torch.tensor(0.25)
    x = ((torch.arange(80) - 40) / 8).expand(batch, 80).contiguous()
    check_each_level(x, weight, None, x_scale)


@some_kinds
@pytest.mark.parametrize("x_scale", [3e-39, 1e-30, 1e30, 2e36])
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_given_scales_at_the_ends_of_float32(batch: int, x_scale: float, kind: Kind):
    weight, scale = make_weight(kind, 33, 300, size=1e-4), torch.tensor(x_scale)
    x = torch.randn(batch, 300) * 100 * x_scale
    x[0, :3] = torch.tensor([3e38, -3e38, 0])
    check_each_level(x, weight, None, scale)


@some_kinds
@pytest.mark.parametrize("batch", [1, 2, 3, 20])
def test_with_a_given_scale_infinity_is_cut_and_nan_spoils_its_row_only(batch: int, kind: Kind):
    weight, x, x_scale = make_weight(kind, 40, 100), torch.randn(batch, 100), torch.tensor(0.01)
    x[0, 3], x[0, 40] = torch.inf, -torch.inf
    largest = x.clamp(-1e6, 1e6)
    spoiled = x.clone()
    spoiled[-1, 77] = torch.nan
    for _level in each_level_with(kind):
        assert torch.equal(run(x, weight, None, x_scale), run(largest, weight, None, x_scale))
        got = run(spoiled, weight, None, x_scale)
        assert got[-1].isnan().all() and got[:-1].isfinite().all()


@some_kinds
@pytest.mark.parametrize("batch", [1, 20])
def test_a_given_scale_of_zero_counts_as_one_and_one_that_is_no_number_gives_nan(batch: int, kind: Kind):
    weight, x = make_weight(kind, 40, 100), torch.randn(batch, 100) * 100
    for _level in each_level_with(kind):
        one = run(x, weight, None, torch.tensor(1.0))
        assert torch.equal(run(x, weight, None, torch.tensor(0.0)), one)
        for bad in (torch.nan, torch.inf):
            assert run(x, weight, None, torch.tensor(bad)).isnan().all()


@some_kinds
@every_float
def test_a_prepared_call_with_a_given_scale_gives_the_product_of_the_definition(
    level: str, dtype: torch.dtype, kind: Kind
):
    skip_without(kind)
    weight, x_scale = make_weight(kind, 33, 200), torch.tensor(0.02)
    call = linear_rounded_op.bind(*weight.rest(), "int8", x_scale)
    for batch in (1, 3, 20):
        x = torch.randn(batch, 200).to(dtype)
        exact = round_activations(x, qint8, scale=x_scale) @ weight.dense().float().T
        error = (call(x, None).float() - exact).abs() / (x.float().abs() @ weight.dense().float().abs().T)
        assert error.max() <= TOLERANCE[dtype]
    x_scale.mul_(2)
    exactly(x, weight, None, x_scale)(call(x, None))


@some_kinds
def test_a_prepared_call_steps_aside_when_its_scale_has_moved(level: str, kind: Kind):
    skip_without(kind)
    weight, x, x_scale = make_weight(kind, 33, 200), torch.randn(3, 200), torch.tensor([0.02])
    call = linear_rounded_op.bind(*weight.rest(), "int8", x_scale)
    assert call(x, None) is not None
    x_scale.data = torch.tensor([0.02])
    assert call(x, None) is None


@pytest.mark.parametrize(
    ("x_scale", "activations", "said"),
    [
        (torch.ones(2), "int8", r"one float32 number, not shape \(2,\)"),
        (torch.ones((), dtype=torch.bfloat16), "int8", "one float32 number, not shape .* torch.bfloat16"),
        (torch.ones(()), None, "rounded to int8 or an 8-bit float, not to None"),
    ],
    ids=["two", "bfloat16", "no activations"],
)
def test_what_cannot_be_the_scale_of_x_is_an_error(x_scale, activations, said):
    with pytest.raises(ValueError, match=said):
        linear_rounded_op.bind(*make_weight(INT8, 5, 64).rest(), activations, x_scale)


# ---------------------------------------------------------------------------------------------------- who is served


@some_kinds
@every_float
def test_a_layer_gives_what_the_definition_gives_with_and_without_the_kernel(
    level: str, dtype: torch.dtype, kind: Kind
):
    skip_without(kind)
    layer = QLinear(
        200, 33, scheme=make_scheme(kind.qtype, kind.group_size, not kind.asymmetric), activations=qint8, dtype=dtype
    ).requires_grad_(False)
    weight = make_weight(kind, 33, 200)
    for name, tensor in zip(("packed", "scale", "zero"), (weight.packed, weight.scale, weight.zero), strict=True):
        if tensor is not None:
            layer._parameters[f"weight_{name}"].copy_(tensor)
    layer.bias.normal_()
    for lead in [(), (1,), (2, 9), (0,)]:
        x = torch.randn(*lead, 200).to(dtype)
        assert (layer._fast_forward(x) is not None) == bool(x.numel())
        made = layer(x)
        layer._bound = BoundCall(None, ())  # no prepared call
        plain = layer(x)
        layer._bound = None
        assert made.shape == plain.shape == (*lead, 33)
        # plain torch rounds x, the weight and the result to the dtype
        size = x.double().reshape(-1, 200).abs() @ weight.dense().abs().T + layer.bias.double().abs()
        error = (made.double() - plain.double()).abs().reshape(-1, 33)
        assert (error <= 2 * torch.finfo(dtype).eps * size + 1e-4 * torch.finfo(dtype).eps ** 0.5).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("int8", -1, False, 200, "float8_e4m3fn"), "for int8 activations, not for float8_e4m3fn"),
        (("nf4", 32, False, 200, "int8"), "int8, int4 and int2 weights, not for nf4"),
        (("int4", 24, False, 200, "int8"), "a multiple of 16 columns"),
        (("int8", 64, False, 200, "int8"), "one scale per row and no zero"),
        (("int8", -1, False, 65537, "int8"), "more than 65536 columns"),
    ],
    ids=["float8", "nf4", "group", "int8 groups", "width"],
)
def test_what_no_kernel_takes_has_a_sentence(arguments, said):
    skip_without(INT8)
    skip_without(Kind("int4", 64))
    assert said in refuses(*arguments)
    assert refuses("int8", -1, False, 65536, "int8") is None
    assert refuses("int4", 24, False, 20, "int8") is None  # one group


def refuses(qtype: str, group_size: int, asymmetric: bool, columns: int, activations: str) -> str | None:
    (weight,) = make_weight(Kind(qtype, group_size, asymmetric), 1, columns).rest()
    return refuses_int8(weight, activations)


@some_kinds
def test_a_level_without_the_kernel_says_so(level: str, kind: Kind, monkeypatch):
    monkeypatch.setattr(NATIVE, "has_kernel", lambda name: False)
    weight = make_weight(kind, 5, 64)
    arguments = (kind.qtype, kind.group_size, kind.asymmetric, 64, "int8")
    assert refuses(*arguments) == f"level {level} has no product of {kind.qtype} and int8"
    assert linear_rounded_op.bind(*weight.rest(), "int8", None) is None


@every_kind
@every_float
def test_no_kernel_is_wrong_on_this_machine(level: str, dtype: torch.dtype, kind: Kind):
    skip_without(kind)
    for many in (False, True):
        key = make_weight(kind, 1, 64).rest()[0].key
        assert linear_rounded_op.why_wrong(linear_rounded_op.kernels[0], (key, dtype, many, "int8")) is None


@every_float
@pytest.mark.parametrize("group_size", [16, 64, 256])
def test_a_layer_as_narrow_as_a_group_has_the_kernel_of_whole_rows(level: str, dtype: torch.dtype, group_size: int):
    """Such a layer was checked with rows of several groups, for which there is no kernel."""
    if refuses("int8", group_size, False, group_size, "int8") is not None:
        pytest.skip("this level has no product of int8 and int8")
    (weight,) = make_weight(Kind("int8", group_size), 5, group_size).rest()
    for rows in (1, 20):
        x = torch.ones(rows, group_size, dtype=dtype)
        assert linear_rounded_op.explain(x, weight, None, "int8", None)[0] == ("native_int8", "runs")


@pytest.mark.parametrize("columns", [1, 16, 40, 64])
@pytest.mark.parametrize("batch", [1, 3, 19])
def test_a_layer_narrower_than_a_group_gives_the_product_of_the_definition(level: str, columns: int, batch: int):
    scheme = make_scheme("int8", 64)
    tensors, x = scheme.quantize(torch.randn(9, columns)), torch.randn(batch, columns)
    wanted = round_activations(x, qint8) @ scheme.dequantize(tensors, columns, torch.float32).T
    call = scheme.bind(tensors, columns, "int8")
    if call is None:
        pytest.skip("this level has no product of int8 and int8")
    torch.testing.assert_close(call(x, None), wanted, rtol=1e-5, atol=1e-5)


@some_kinds
@pytest.mark.parametrize("rows", [1, 3, 19])
def test_a_wrong_kernel_is_reported_once_and_never_used(level: str, rows: int, kind: Kind, monkeypatch):
    skip_without(kind)
    name = linear_name(*make_weight(kind, 1, 64).rest(), "int8")
    right = getattr(NATIVE, name)

    def wrong(packed: int, *rest: int) -> None:
        # the neighbours of the codes, for as many rows as these
        right(packed + (rest[11] == rows), *rest)

    monkeypatch.setattr(NATIVE, name, wrong)
    why_kernel_wrong.cache_clear()
    weight, x = make_weight(kind, 17, 200), torch.randn(rows, 200)
    call = linear_rounded_op.bind(*weight.rest(), "int8", None)
    with pytest.warns(RuntimeWarning) as caught:
        assert call(x, None) is None and call(x, None) is None
    (warning,) = caught
    for part in (level, kind.qtype, "int8 activations", "disagrees with the reference", "slower kernels are used"):
        assert part in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = dict(linear_rounded_op.explain(x, *weight.rest(), None, "int8", None))
        assert "disagrees" in said["native_int8"] and said["rounding, linear"] == "runs"
    why_kernel_wrong.cache_clear()
