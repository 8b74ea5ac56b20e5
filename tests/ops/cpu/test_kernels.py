"""The native kernels against the product in float64: every level of instructions, number type, dtype and grouping, over
shapes that are multiples of nothing, numbers that overflow or vanish, tensors at odd addresses, and threads."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from native_weights import (
    FLOATS,
    LEVELS,
    Exact,
    Kind,
    Weight,
    classes,
    each_level,
    every_float,
    make_weight,
    native,
    needs_native,
)
from torch import nn

from quanto_hf.nn import QLinear
from quanto_hf.ops import GroupedWeight, dequantize_op, groups, linear, linear_grad_input, linear_op, pack
from quanto_hf.ops.cpu.library import NATIVE
from quanto_hf.qtypes import QTYPES
from quanto_hf.schemes import make_scheme

pytestmark = needs_native

GROUP_SIZES = (-1, 32, 64, 128, 96, 16, 7)
ALL_KINDS = [
    Kind(name, group_size, asymmetric)
    for name, number in QTYPES.items()
    for group_size in GROUP_SIZES
    for asymmetric in ((False, True) if number.kind == "int" else (False,))
]
# One for each kernel: rows of bytes, bytes in groups, and codes that are looked up per row, 64 columns, more, and 32.
KINDS = [
    Kind("int8", -1),
    Kind("int8", 32),
    Kind("int4", 64, True),
    Kind("int4", 96, True),
    Kind("int4", -1),
    Kind("int2", 128, True),
    Kind("float8_e4m3fn", -1),
    Kind("float8_e5m2", 64),
    Kind("nf4", 32),
    Kind("fp4", 7),
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
any_kind = pytest.mark.parametrize("kind", ALL_KINDS, ids=str)

# Out and in features. A single weight; less than a block of codes; blocks and a rest; more than one chunk of columns;
# more than one panel of rows; whole blocks; more columns than stay in the first-level cache.
SHAPES = [(1, 1), (17, 200), (33, 513), (5, 2049), (96, 1000), (200, 70), (130, 640), (3, 8300)]
# Rows of x: those with kernels of their own, both sides of each border, and of a whole block of x (512).
ROWS = [1, 2, 5, 7, 8, 9, 15, 16, 17, 32, 33, 64, 127, 512, 513]


def random_x(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)).to(dtype)


# ---------------------------------------------------------------------------------------------------- the product


@any_kind
@every_float
def test_the_product_is_that_of_float64(kind: Kind, dtype: torch.dtype):
    # Three of the eight shapes for each combination, and a third of the numbers of rows for each, so that over the
    # dtypes each kind meets all shapes, and each shape and dtype meets every number of rows with many kinds.
    number = ALL_KINDS.index(kind)
    first = number + 3 * list(FLOATS.values()).index(dtype)
    for turn in range(first, first + 3):
        n, k = SHAPES[turn % 8]
        weight, rows = make_weight(kind, n, k, seed=turn), ROWS[(turn + number) % 3 :: 3]
        x, bias = random_x(rows[-1], k, dtype), torch.randn(n).to(dtype) if turn % 2 else None
        exact = Exact.of(x, weight, bias)
        for _level in each_level():
            for m in rows:
                exact.check(native()(*weight.linear(x[:m], bias)), m)


@every_kind
@every_float
def test_every_kernel_meets_every_shape(kind: Kind, dtype: torch.dtype):
    # Three of the eight shapes for each combination, so that over the dtypes a kind meets all of them.
    first = KINDS.index(kind) + 3 * list(FLOATS.values()).index(dtype)
    for shape in (SHAPES[(first + step) % 8] for step in range(3)):
        weight, x, bias = make_weight(kind, *shape), random_x(17, shape[1], dtype), torch.randn(shape[0]).to(dtype)
        with_bias, without = Exact.of(x, weight, bias), Exact.of(x, weight)
        for _level in each_level():
            for m in (1, 2, 8, 17):
                with_bias.check(native()(*weight.linear(x[:m], bias)), m)
                without.check(native()(*weight.linear(x[:m])), m)


@every_kind
@every_float
def test_scales_may_have_any_float_dtype(kind: Kind, dtype: torch.dtype):
    for scale_dtype in FLOATS.values():
        weight, x = make_weight(kind, 17, 200, scale_dtype=scale_dtype), random_x(17, 200, dtype)
        exact = Exact.of(x, weight)
        for _level in each_level():
            for m in (1, 5, 17):
                exact.check(native()(*weight.linear(x[:m])), m)


@every_float
@pytest.mark.parametrize("group_size", [-1, 32])
def test_the_code_minus_128_of_a_foreign_checkpoint_is_multiplied_right(dtype: torch.dtype, group_size: int):
    # our own int8 ends at -127, and the magnitude of -128 does not fit into 7 bits
    weight, x = make_weight(Kind("int8", group_size), 17, 200), random_x(17, 200, dtype)
    weight.packed.fill_(-128)
    exact = Exact.of(x, weight)
    for _level in each_level():
        for m in (1, 8, 17):
            exact.check(native()(*weight.linear(x[:m])), m)


# Hypothesis keeps its examples out of the repository: the same ones come in every run.
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(sorted(QTYPES)),
    st.sampled_from([-1, 1, 2, 7, 16, 31, 32, 33, 64, 96, 128, 160, 256, 1000]),
    st.booleans(),
    st.integers(1, 140),
    st.integers(1, 700),
    st.integers(1, 40),
    st.sampled_from(list(FLOATS.values())),
    st.sampled_from(list(FLOATS.values())),
    st.booleans(),
    st.sampled_from(LEVELS or ["none"]),
)
def test_whatever_is_asked_the_product_is_that_of_float64(
    qtype: str,
    group_size: int,
    asymmetric: bool,
    n: int,
    k: int,
    m: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    biased: bool,
    name: str,
):
    before = NATIVE.level()
    NATIVE.use_level(name)
    try:
        kind = Kind(qtype, group_size, asymmetric and QTYPES[qtype].kind == "int")
        weight, x = make_weight(kind, n, k, scale_dtype=scale_dtype), random_x(m, k, dtype)
        bias = random_x(1, n, dtype)[0] if biased else None
        Exact.of(x, weight, bias).check(native()(*weight.linear(x, bias)))
        assert torch.equal(native(dequantize_op)(*weight.rest(), dtype), dequantize_op.reference(*weight.rest(), dtype))
    finally:
        NATIVE.use_level(before)


# ---------------------------------------------------------------------------------------------------- extremes


@every_kind
@every_float
def test_rows_of_zeros_give_the_bias_to_the_bit(kind: Kind, dtype: torch.dtype):
    weight, x, bias = make_weight(kind, 17, 200), random_x(9, 200, dtype), torch.randn(17).to(dtype)
    weight.scale[::2] = 0
    for _level in each_level():
        for m in (1, 2, 5, 9):
            made = native()(*weight.linear(x[:m], bias))
            assert torch.equal(made[:, ::2], bias[::2].expand(m, -1))
            assert (native()(*weight.linear(x[:m]))[:, ::2] == 0).all()


@every_kind
@every_float
def test_codes_that_stand_for_zero_give_the_bias(kind: Kind, dtype: torch.dtype):
    weight, x, bias = make_weight(kind, 17, 200), random_x(9, 200, dtype), torch.randn(17).to(dtype)
    number = QTYPES[kind.qtype]
    code = {"int": number.levels // 2 if number.is_packed else 0, "float": 0, "table": 0}[number.kind]
    if kind.qtype == "nf4":
        code = number.values.index(0.0)
    weight.packed = pack(torch.full((17, 200), code).to(number.storage), number.bits)
    if weight.zero is not None:
        weight.zero.fill_(code)
    assert not weight.dense().any()
    exact = Exact.of(x, weight, bias)
    for _level in each_level():
        for m in (1, 2, 5, 9):
            made = native()(*weight.linear(x[:m], bias))
            if weight.zero is None:
                assert torch.equal(made, bias.expand(m, -1))
            else:  # number * x and zero * x may be summed on their own: see Exact
                exact.check(made, m)


@every_kind
@every_float
def test_an_input_of_zeros_gives_the_bias_to_the_bit(kind: Kind, dtype: torch.dtype):
    weight, bias = make_weight(kind, 17, 200), torch.randn(17).to(dtype)
    for _level in each_level():
        for m in (1, 2, 5, 9):
            assert torch.equal(native()(*weight.linear(torch.zeros(m, 200, dtype=dtype), bias)), bias.expand(m, -1))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])  # float16 ends before
def test_a_scale_of_any_size_brings_an_input_of_the_inverse_size_back(kind: Kind, dtype: torch.dtype):
    # Products are about 1; sums of numbers and inputs alone would overflow, or vanish. The bfloat16 product of the
    # processor, which torch's own uses too, takes a number below the smallest normal one, 2^-126, for zero.
    for power in (-140, -100, 100):
        size = 2.0**power / (57344 if kind.qtype == "float8_e5m2" else 1)
        weight = make_weight(kind, 17, 200, size=max(size, 2.0**-149 * 64), scale_dtype=torch.float32)
        x = (random_x(17, 200, torch.float32) * 2.0 ** min(-power, 120)).to(dtype)
        exact = Exact.of(x, weight, tiny=2.0**-126)
        for _level in each_level():
            for m in (1, 2, 5, 17):
                made = native()(*weight.linear(x[:m]))
                assert torch.isfinite(made).all()
                exact.check(made, m)


@every_kind
@every_float
def test_subnormal_inputs_and_scales(kind: Kind, dtype: torch.dtype):
    smallest = torch.finfo(dtype).smallest_normal
    x = (random_x(17, 200, torch.float32) * smallest / 8).to(dtype)
    assert ((x != 0) & (x.abs() < smallest)).any()
    # float16 has its subnormals everywhere; the bfloat16 product of the processor takes those of bfloat16 for zero
    tiny = 2.0**-126 if dtype is torch.bfloat16 else 2.0**-149
    for size in (1.0, 2.0**-130):
        weight = make_weight(kind, 17, 200, size=size, scale_dtype=torch.float32)
        exact = Exact.of(x, weight, tiny=tiny)
        for _level in each_level():
            for m in (1, 2, 5, 17):
                exact.check(native()(*weight.linear(x[:m])), m)


def fraction_of_largest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max * 0.9


@every_kind
@every_float
def test_huge_inputs_do_not_overflow_where_the_product_does_not(kind: Kind, dtype: torch.dtype):
    # Partial sums are left to the order of the sum, here as in torch. So the sum of the magnitudes is what fits.
    n, k = 17, 200
    x = (random_x(17, k, torch.float32).clamp(-1, 1) * fraction_of_largest(dtype)).to(dtype)
    weight = make_weight(kind, n, k, size=1.0, scale_dtype=torch.float32)
    weight.scale /= weight.wide().sum(1, keepdim=True)
    exact = Exact.of(x, weight)
    for _level in each_level():
        for m in (1, 2, 5, 17):
            made = native()(*weight.linear(x[:m]))
            assert torch.isfinite(made).all()
            exact.check(made, m)


@every_kind
@every_float
def test_a_product_beyond_the_dtype_is_an_infinity_of_its_sign_as_in_torch(kind: Kind, dtype: torch.dtype):
    n, k = 17, 200
    weight = make_weight(kind, n, k, size=1.0)
    dense = weight.dense()
    # an input with the signs of the weight's row: every partial sum grows
    for row, sign in ((0, 1), (3, -1)):
        x = (sign * dense[row].sign() * fraction_of_largest(dtype)).to(dtype).expand(9, k).contiguous()
        expected = F.linear(x, dense.to(dtype))[:, row]
        assert (classes(expected) == sign).all()
        for _level in each_level():
            for m in (1, 2, 5, 9):
                assert torch.equal(native()(*weight.linear(x[:m]))[:, row], expected[:m])


# ---------------------------------------------------------------------------------------------------- NaN and infinity
#
# A result is NaN, +inf, -inf or finite as in F.linear with the dequantized weight. IEEE arithmetic leaves two things
# open: the sign of a NaN, and finite sums that overflow on the way, whose order torch does not fix either. The tests
# have neither. Infinity minus infinity and infinity times zero are NaN in every order.


def check_classes(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    dense = weight.rest()[0].dense(torch.float32)
    expected = classes(x.double() @ dense.double().T + (0 if bias is None else bias.double()))
    # torch agrees, so that this is no opinion of ours
    assert torch.equal(classes(F.linear(x, dense.to(x.dtype), bias)), expected)
    assert expected.any()
    for _level in each_level():
        for m in (1, 2, 5, len(x)):
            rows = range(0, len(x) - m + 1, m)
            made = torch.cat([native()(*weight.linear(x[i : i + m], bias)) for i in rows])
            assert torch.equal(classes(made), expected[: len(made)]), f"{m} rows"


SPECIALS = (float("inf"), float("-inf"), float("nan"))


@every_kind
@every_float
def test_nan_and_infinity_in_the_input(kind: Kind, dtype: torch.dtype):
    # one of two shapes, so that over the dtypes every kind meets both
    turn = KINDS.index(kind) + list(FLOATS.values()).index(dtype)
    n, k = ((17, 200), (33, 513))[turn % 2]
    weight, x = make_weight(kind, n, k), random_x(20, k, dtype)
    for row, column in enumerate((0, 1, 31, 32, 63, 64, 127, 128, k - 73, k - 2, k - 1)):
        x[row, column] = SPECIALS[row % 3]
    x[12, 5], x[12, 150] = SPECIALS[:2]
    x[13] = SPECIALS[0]
    check_classes(weight, x)
    bias = torch.randn(n).to(dtype)
    bias[0], bias[2], bias[-1] = SPECIALS
    check_classes(weight, x, bias)


@every_float
@pytest.mark.parametrize("qtype", ["float8_e4m3fn", "float8_e5m2"])
def test_nan_and_infinity_in_the_codes(qtype: str, dtype: torch.dtype):
    weight, x = make_weight(Kind(qtype, -1), 33, 513), random_x(20, 513, dtype)
    infinities = (0x7F, 0xFF) if qtype == "float8_e4m3fn" else (0x7C, 0xFC)  # e4m3 has none, but another NaN
    for code, row, column in zip(
        (0x7F, 0xFF, *infinities) * 2, range(0, 32, 4), (0, 1, 31, 63, 64, 300, 511, 512), strict=True
    ):
        weight.packed[row, column] = code
    check_classes(weight, x)


@every_kind
@every_float
def test_nan_and_infinity_in_scales_and_zeros(kind: Kind, dtype: torch.dtype):
    for name in ("scale", "zero") if kind.asymmetric else ("scale",):
        weight, x = make_weight(kind, 33, 513), random_x(20, 513, dtype)
        tensor = getattr(weight, name)
        for row, group in ((0, 0), (4, 1), (5, 2), (17, 3), (18, 4), (31, -1), (32, -1)):
            tensor[row, min(group, tensor.shape[1] - 1)] = SPECIALS[row % 3]
        x[3] = 0  # times infinity: NaN
        x[4] = x[4].abs()
        check_classes(weight, x)


@every_float
def test_memory_behind_the_last_scale_has_no_part_in_the_result(dtype: torch.dtype):
    # a call with NaN among 32 scales leaves it in the scratch memory of the thread; the next one has 18 of them
    torch.set_num_threads(1)
    kind = Kind("int4", 64, True)
    long, short = make_weight(kind, 8, 32 * 64), make_weight(kind, 8, 18 * 64)
    x = random_x(1, 18 * 64, dtype)
    exact = Exact.of(x, short)
    long.scale[:] = torch.nan
    for _level in each_level():
        native()(*long.linear(random_x(1, 32 * 64, dtype)))
        exact.check(native()(*short.linear(x)))


@every_float
@pytest.mark.parametrize("qtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("group_size", [-1, 64])
def test_all_256_codes_of_a_float8_are_decoded_nan_and_infinity_too(qtype: str, dtype: torch.dtype, group_size: int):
    kind = Kind(qtype, group_size)
    codes = torch.arange(256, dtype=torch.uint8).repeat(5, 1)
    weight = Weight(codes, torch.ones(5, groups(256, group_size)), None, kind, 256)
    expected = codes.view(QTYPES[qtype].float_dtype).to(dtype)
    # the same code by code: one column of ones, all others zero, is taken apart by rows of the weight
    column = Weight(codes[0, :, None].contiguous(), torch.ones(256, 1), None, Kind(qtype, -1), 1)
    for _level in each_level():
        made = native(dequantize_op)(*weight.rest(), dtype)
        assert torch.equal(made.nan_to_num(12345.0), expected.nan_to_num(12345.0))
        assert torch.equal(classes(made), classes(expected))
        assert (classes(made) != 0).any()
        for m in (1, 9):
            made = native()(*column.linear(torch.ones(m, 1, dtype=dtype)))
            assert torch.equal(classes(made), classes(expected[0]).expand(m, -1))
            assert torch.equal(made.nan_to_num(12345.0), expected[0].nan_to_num(12345.0).expand(m, -1))


# ---------------------------------------------------------------------------------------------------- threads


@every_kind
@every_float
def test_results_do_not_depend_on_the_number_of_threads(kind: Kind, dtype: torch.dtype):
    weight, x, bias = make_weight(kind, 200, 200), random_x(70, 200, dtype), torch.randn(200).to(dtype)
    for _level in each_level():
        made = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            made.append([native()(*weight.linear(x[:m], bias)) for m in (1, 2, 7, 70)])
        for m, first, *others in zip((1, 2, 7, 70), *made, strict=True):
            assert all(torch.equal(first, other) for other in others), f"{m} rows"


@every_float
def test_python_threads_may_call_at_once(level: str, dtype: torch.dtype):
    weights = [make_weight(kind, 130, 200) for kind in KINDS]
    inputs = [random_x(m, 200, dtype) for m in (1, 2, 7, 33)]
    cases = [weight.linear(x) for weight in weights for x in inputs]
    expected = [native()(*case) for case in cases]

    def run(start: int) -> bool:
        order = [(start * 7 + i) % len(cases) for i in range(len(cases))]
        return all(torch.equal(native()(*cases[i]), expected[i]) for i in order)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(run, range(12)))


# ---------------------------------------------------------------------------------------------------- tensors


def shifted(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy that starts ``offset`` numbers into its storage."""
    storage = torch.empty(tensor.numel() + offset + 3, dtype=tensor.dtype)
    view = storage[offset : offset + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)


@every_kind
@every_float
def test_tensors_may_start_anywhere(kind: Kind, dtype: torch.dtype):
    weight, x, bias = make_weight(kind, 33, 513), random_x(17, 513, dtype), torch.randn(33).to(dtype)
    # one of two odd addresses, so that over the dtypes every kind meets both
    offset = 1 + 2 * ((KINDS.index(kind) + list(FLOATS.values()).index(dtype)) % 2)
    moved = Weight(
        shifted(weight.packed, offset),
        shifted(weight.scale, offset),
        None if weight.zero is None else shifted(weight.zero, offset),
        kind,
        513,
    )
    assert moved.packed.data_ptr() % 4 == offset
    for _level in each_level():
        for m in (1, 2, 5, 17):
            expected = native()(*weight.linear(x[:m], bias))
            assert torch.equal(native()(*moved.linear(shifted(x[:m], offset), shifted(bias, offset))), expected)
        assert torch.equal(native(dequantize_op)(*moved.rest(), dtype), native(dequantize_op)(*weight.rest(), dtype))


def strided(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The same numbers in other orders of memory."""
    wide = torch.empty(2 * tensor.shape[0], 3 * tensor.shape[1], dtype=tensor.dtype)
    slices = wide[::2, ::3].copy_(tensor)
    return [tensor.T.contiguous().T, slices]


@every_kind
@every_float
def test_tensors_need_not_be_contiguous(kind: Kind, dtype: torch.dtype):
    weight, x, bias = make_weight(kind, 17, 200), random_x(9, 200, dtype), torch.randn(17).to(dtype)
    for i in range(2):
        parts = [None if t is None else strided(t)[i] for t in (weight.packed, weight.scale, weight.zero)]
        other = Weight(*parts, kind, 200)
        for _level in each_level():
            expected = native()(*weight.linear(x, bias))
            assert torch.equal(native()(*other.linear(strided(x)[i], strided(bias[None])[i][0])), expected)
            dense = native(dequantize_op)(*weight.rest(), dtype)
            assert torch.equal(native(dequantize_op)(*other.rest(), dtype), dense)


def test_a_view_with_the_negative_bit_is_read_as_what_it_says(level: str):
    weight, x = make_weight(Kind("int4", 64, True), 17, 200), random_x(9, 200, torch.float32)
    view = torch.complex(x, x).conj().imag
    assert view.is_neg()
    Exact.of(-x, weight).check(native()(*weight.linear(view)))


def spoiled(weight: Weight) -> dict[str, tuple[Any, ...]]:
    """Arguments of ``linear`` that no kernel may see, each by the name of what is wrong."""
    x, value, bias = weight.linear(random_x(3, 200, torch.float32), torch.randn(17))
    packed, scale, zero = value.stored
    other = torch.int8 if packed.dtype is torch.uint8 else torch.uint8
    cases = {
        "packed one row short": (x, value._replace(packed=packed[1:]), bias),
        "packed one byte short": (x, value._replace(packed=packed[:, 1:].contiguous()), bias),
        "packed of three dimensions": (x, value._replace(packed=packed[None]), bias),
        "packed of one dimension": (x, value._replace(packed=packed.flatten()), bias),
        "packed of another dtype": (x, value._replace(packed=packed.to(other)), bias),
        "packed as wider numbers": (x, value._replace(packed=packed.to(torch.int32)), bias),
        "scale one row short": (x, value._replace(scale=scale[1:]), bias),
        "scale transposed": (x, value._replace(scale=scale.T), bias),
        "scale flat": (x, value._replace(scale=scale.flatten()), bias),
        "scale in float64": (x, value._replace(scale=scale.double()), bias),
        "scale of integers": (x, value._replace(scale=scale.int()), bias),
        "bias one number short": (x, value, bias[1:]),
        "bias of another dtype": (x, value, bias.half()),
        "bias of two dimensions": (x, value, bias[None]),
        "input two columns short": (x[:, 2:], value, bias),
        "input in float64": (x.double(), value, bias),
        "input of complex numbers": (x.to(torch.complex64), value, bias),
        "input without dimensions": (x[0, 0], value, bias),
    }
    if zero is not None:
        cases |= {
            "zero one row short": (x, value._replace(zero=zero[1:]), bias),
            "zero of another dtype than scale": (x, value._replace(zero=zero.float()), bias),
            "zero in float64": (x, value._replace(zero=zero.double()), bias),
        }
    return cases


@pytest.mark.parametrize("kind", [Kind("int8", 32), Kind("int4", 64, True), Kind("float8_e4m3fn", 64)], ids=str)
def test_tensors_that_do_not_fit_are_an_error_before_a_kernel_sees_them(kind: Kind, monkeypatch):
    cases, ran = spoiled(make_weight(kind, 17, 200)), []
    for name in ("linear", "dequantize"):
        monkeypatch.setattr(NATIVE, name, lambda *args: ran.append(args))
    for case, args in cases.items():
        if case == "packed one byte short" and QTYPES[kind.qtype].bits == 8:
            assert args[1].packed.shape[1] != args[0].shape[1]
        for op in (linear, linear_op, linear_op.in_graph):
            with pytest.raises(ValueError):
                op(*args)
                pytest.fail(f"no error for {case}")
    assert not ran


@pytest.mark.parametrize("which", range(5), ids=["x", "packed", "scale", "zero", "bias"])
def test_a_tensor_on_another_device_is_never_read_as_memory(which: int):
    x, weight, bias = make_weight(Kind("int4", 64, True), 17, 200).linear(
        random_x(3, 200, torch.float32), torch.randn(17)
    )
    tensors = [x, *weight.stored, bias]
    tensors[which] = tensors[which].to("meta")
    args = (tensors[0], GroupedWeight(*tensors[1:4], *weight[3:]), tensors[4])
    # through torch's dispatcher a meta tensor chooses the fake, which reads nothing
    for op in (linear, linear_op):
        with pytest.raises(ValueError, match=r"meta.*cpu|cpu.*meta"):
            op(*args)


# ---------------------------------------------------------------------------------------------------- other ops


@any_kind
@every_float
def test_a_weight_is_dequantized_to_the_bit(kind: Kind, dtype: torch.dtype):
    # Three of the eight shapes for each combination, so that over the dtypes a kind meets all of them.
    number, order = ALL_KINDS.index(kind), list(FLOATS.values()).index(dtype)
    for i in range(3 * order, 3 * order + 3):
        scale_dtype = list(FLOATS.values())[(i + number) % 3]
        weight = make_weight(kind, *SHAPES[(i + number) % 8], scale_dtype=scale_dtype)
        expected = dequantize_op.reference(*weight.rest(), dtype)
        for _level in each_level():
            assert torch.equal(native(dequantize_op)(*weight.rest(), dtype), expected)


@every_kind
@every_float
def test_tiny_and_huge_weights_are_dequantized_to_the_bit(kind: Kind, dtype: torch.dtype):
    for size in (2.0**-145, 2.0**-128, 2.0**-20, 2.0**127):
        weight = make_weight(kind, 17, 200, size=size, scale_dtype=torch.float32)
        expected = dequantize_op.reference(*weight.rest(), dtype)
        for _level in each_level():
            made = native(dequantize_op)(*weight.rest(), dtype)
            assert torch.equal(classes(made), classes(expected))
            assert torch.equal(made.nan_to_num(0.0), expected.nan_to_num(0.0))


def check_gradient(made: torch.Tensor, grad: torch.Tensor, weight: Weight) -> None:
    """Three roundings to the dtype: of the weight, of the product of a block of rows, of the sum of blocks."""
    a, b, dtype = grad.double(), weight.dense(), grad.dtype
    unit = torch.finfo(dtype).eps / 2
    bound = (a.abs() @ b.abs()) * (3 if dtype is not torch.float32 else 4 + b.shape[0]) * unit
    if dtype is torch.float16:
        bound += 2**-24 * (1 + a.abs().sum(1, keepdim=True))
    assert made.dtype == dtype
    assert ((made.double() - a @ b).abs() <= bound).all()


@every_kind
@every_float
def test_the_gradient_to_the_input_is_that_of_float64(kind: Kind, dtype: torch.dtype):
    for n, k in ((1, 1), (17, 200), (200, 70), (33, 513)):
        weight, grad = make_weight(kind, n, k), random_x(9, n, dtype)
        for _level in each_level():
            check_gradient(native(linear_grad_input)(grad, *weight.rest()), grad, weight)


@every_float
def test_the_gradient_takes_any_leading_shape_and_any_strides(level: str, dtype: torch.dtype):
    weight, grad = make_weight(Kind("int4", 64, True), 17, 200), random_x(6, 17, dtype)
    made = native(linear_grad_input)(grad.view(2, 3, 17).transpose(0, 1), *weight.rest())
    check_gradient(made.transpose(0, 1).reshape(6, 200), grad, weight)


@pytest.mark.parametrize("weights", ["int8", "int4", "int2", "float8", "nf4"])
def test_a_training_step_through_a_frozen_layer_is_that_of_the_float_weight(level: str, weights: str):
    layer = QLinear.from_module(nn.Linear(200, 17, dtype=torch.bfloat16), make_scheme(weights))
    layer.freeze()
    dense = nn.Linear(200, 17)
    dense.weight.data, dense.bias.data = layer.dequantized().float(), layer.bias.detach().float()
    x = random_x(9, 200, torch.bfloat16).requires_grad_()
    copy = x.detach().float().requires_grad_()
    aim = random_x(9, 17, torch.float32)
    optimizers = [torch.optim.SGD([layer.bias], 0.5), torch.optim.SGD([dense.bias], 0.5)]
    losses = []
    for module, optimizer, given_x in zip((layer, dense), optimizers, (x, copy), strict=True):
        for _ in range(2):
            optimizer.zero_grad()
            loss = F.mse_loss(module(given_x).float(), aim)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    # bfloat16 rounds outputs, and their gradients: a few units of 2^-8 of the largest one
    assert abs(losses[0] - losses[1]) <= 2**-5 * losses[1]
    assert (x.grad.float() - copy.grad).abs().max() <= 2**-5 * copy.grad.abs().max()
    assert (layer.bias.float() - dense.bias).abs().max() <= 2**-5 * dense.bias.abs().max()
    assert all(tensor.grad is None for tensor in layer.tensors().values())


@pytest.mark.parametrize("kind", [Kind("int8", -1), Kind("int4", 64, True), Kind("nf4", 32)], ids=str)
def test_the_gradient_of_a_direction_is_the_difference_along_it(level: str, kind: Kind):
    # the product is linear in x and in bias: a difference over any distance is exact but for rounding
    weight, x, bias = make_weight(kind, 17, 200), random_x(3, 200, torch.float32), torch.randn(17)
    x.requires_grad_(), bias.requires_grad_()
    direction, up = random_x(4, 200, torch.float32)[:3], random_x(3, 17, torch.float32)
    (linear(*weight.linear(x, bias)) * up).sum().backward()
    with torch.no_grad():
        difference = (linear(*weight.linear(x + direction, bias)) - linear(*weight.linear(x, bias))) * up
    torch.testing.assert_close((x.grad * direction).sum(), difference.sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad, up.sum(0))
