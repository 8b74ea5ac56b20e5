"""The op ``linear``: every kernel against the product in float64, its gradients, its threads, and its errors."""

import importlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from quanto_hf.ops import GroupedWeight, groups, linear, linear_grad_input, linear_op, pack
from quanto_hf.qtypes import QTYPES

blocks = importlib.import_module("quanto_hf.ops.grouped_weight")

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
every_float = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)

# qtype, group_size, asymmetric: as the schemes make them
KINDS = {
    "int8": ("int8", -1, False),
    "int8-g32": ("int8", 32, False),
    "int4-g64-asym": ("int4", 64, True),
    "int4": ("int4", -1, False),
    "int2-g16-asym": ("int2", 16, True),
    "float8_e4m3fn": ("float8_e4m3fn", -1, False),
    "float8_e5m2": ("float8_e5m2", -1, False),
    "nf4-g64": ("nf4", 64, False),
    "fp4-g32": ("fp4", 32, False),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)

# Out and in features: a single weight, odd numbers with short last groups, and what torch's int8 product takes.
SHAPES = [(1, 1), (5, 77), (67, 144)]
# Rows of x: both sides of the borders at which another kernel takes over.
ROWS = [1, 2, 7, 8, 9, 17, 33, 128, 512]
LEADS = [(), (0,), (5,), (2, 0), (2, 9), (2, 1, 3)]


def make_weight(kind: tuple[str, int, bool], rows: int, columns: int, size: float = 0.02) -> GroupedWeight:
    """With random codes."""
    qtype, group_size, asymmetric = kind
    number = QTYPES[qtype]
    if number.float_dtype is not None:
        codes = (torch.randn(rows, columns) * 50).to(number.float_dtype).view(torch.uint8)
    elif qtype == "int8":
        codes = torch.randint(-127, 128, (rows, columns)).to(torch.int8)
    else:
        codes = torch.randint(0, number.levels, (rows, columns)).to(torch.uint8)
    shape, dtype = (rows, groups(columns, group_size)), torch.float32 if group_size < 0 else torch.bfloat16
    scale = ((torch.rand(shape) + 0.1) * size).to(dtype)
    zero = (torch.rand(shape) * number.levels).to(dtype) if asymmetric else None
    return GroupedWeight(pack(codes, number.bits), scale, zero, qtype, group_size, columns)


def dense(weight: GroupedWeight) -> torch.Tensor:
    """The weight in float64."""
    return weight.dense(torch.float32).double()


def check(made: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """``made`` is ``a @ b + bias`` to within the roundings of its dtype.

    At most four, of half a unit in the last place each: two of a weight, one of the sum, one of the result (or of the
    sum scaled late). Sums are kept in float32, whose rounding is far below that of 16 bits. Each is relative to the
    size of its terms.
    """
    a, b = a.double(), b.double()
    expected, terms = a @ b, a.abs() @ b.abs()
    if bias is not None:
        expected, terms = expected + bias.double(), terms + bias.double().abs()
    roundings = 4 if made.dtype is not torch.float32 else 4 + b.shape[0]
    bound = terms * (roundings / 2 * torch.finfo(made.dtype).eps)
    if made.dtype is torch.float16:
        # weights and results below the smallest normal float16 are multiples of 2^-24
        bound += 2**-25 * (a.abs().sum(-1, keepdim=True) + 1)
    error = (made.double() - expected).abs()
    assert made.shape == expected.shape
    assert (error <= bound).all(), f"error {error.max():.3g}, {(error / bound).max():.3g} times the bound"


def turn_of(kind: tuple[str, int, bool], dtype: torch.dtype) -> int:
    """Where a combination begins in a list of cases of which it meets some: the next one begins one further."""
    return list(KINDS.values()).index(kind) + list(FLOATS.values()).index(dtype)


def every_way(args: tuple[Any, ...]) -> dict[str, Any]:
    """All that can run these arguments."""
    ways = {kernel.name: kernel.run for kernel in linear_op.kernels if kernel.refuses(*args) is None}
    return {"linear": linear, "reference": linear_op.reference, "torch_op": linear_op.in_graph, **ways}


@every_kind
@every_float
def test_every_kernel_multiplies_as_float64_does(dtype: torch.dtype, kind):
    # Three of the nine numbers of rows for each shape, so that over the dtypes each kind meets all of them.
    for turn, (n, k) in enumerate(SHAPES, turn_of(kind, dtype)):
        weight = make_weight(kind, n, k)
        for m in (ROWS[(turn + step) % 9] for step in (0, 3, 6)):
            x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype) if m % 2 else None
            args = (x, weight, bias)
            for run in every_way(args).values():
                check(run(*args), x, dense(weight).T, bias)


@pytest.mark.parametrize("m, k", [(8, 144), (1, 16), (9, 144), (8, 140), (8, 77)], ids=str)
def test_torchs_int8_product_runs_for_few_rows_of_whole_vectors_only(m: int, k: int):
    # other widths make it read behind its tensors, which at best is a crash
    weight, x = make_weight(KINDS["int8"], 5, k), torch.randn(m, k).bfloat16()
    ways = every_way((x, weight, None))
    assert ("torch_int8pack" in ways) == (m <= 8 and k % 16 == 0)


def test_torchs_int8_product_knows_no_zero():
    weight = make_weight(KINDS["int8"], 5, 32)
    weight = weight._replace(zero=torch.full_like(weight.scale, 3.0))
    args = (torch.randn(2, 32).bfloat16(), weight, None)
    assert "torch_int8pack" not in every_way(args)
    check(linear(*args), args[0], dense(weight).T)


@every_kind
@every_float
def test_an_input_may_have_any_leading_shape(dtype: torch.dtype, kind):
    weight, bias, turn = make_weight(kind, 5, 48), torch.randn(5).to(dtype), turn_of(kind, dtype)
    # over the dtypes each kind meets all of them
    for lead in (LEADS[(turn + step) % 6] for step in (0, 3)):
        x = torch.randn(*lead, 48).to(dtype)
        args = (x, weight, bias)
        for run in every_way(args).values():
            made = run(*args)
            assert made.shape == (*lead, 5) and made.dtype == dtype and made.is_contiguous()
            check(made.view(-1, 5), x.view(-1, 48), dense(weight).T, bias)


@every_kind
@every_float
def test_an_input_need_not_be_contiguous(dtype: torch.dtype, kind):
    weight = make_weight(kind, 5, 48)
    for x in (torch.randn(48, 3).T, torch.randn(3, 96)[:, ::2], torch.randn(4, 3, 48).transpose(0, 1)):
        x = x.to(dtype)
        args = (x, weight, None)
        for run in every_way(args).values():
            check(run(*args).reshape(-1, 5), x.reshape(-1, 48), dense(weight).T)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e25], ids="scale{:g}".format)
def test_scales_of_any_size_neither_overflow_nor_vanish(size: float, dtype: torch.dtype, kind):
    # the product is about 1; the codes of e5m2 times the inverse stay below the largest float
    weight, x = make_weight(kind, 5, 48, size), (torch.randn(3, 48) / size).to(dtype)
    args = (x, weight, None)
    for run in every_way(args).values():
        check(run(*args), x, dense(weight).T)


@every_kind
@every_float
def test_rows_of_zeros_give_the_bias(dtype: torch.dtype, kind):
    weight = make_weight(kind, 5, 48)
    bias = torch.randn(5).to(dtype)
    args = (torch.randn(3, 48).to(dtype), weight._replace(scale=torch.zeros_like(weight.scale)), bias)
    for run in every_way(args).values():
        assert torch.equal(run(*args), bias.expand(3, 5))


@every_kind
@every_float
@pytest.mark.parametrize("block_bytes", [1, 1000], ids=["one-row", "some-rows"])
def test_blocks_of_rows_join_without_a_seam(block_bytes: int, dtype: torch.dtype, kind, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_WEIGHT_BYTES", block_bytes)
    weight, x, bias = make_weight(kind, 23, 48), torch.randn(9, 48).to(dtype), torch.randn(23).to(dtype)
    check(linear(x, weight, bias), x, dense(weight).T, bias)
    grad = torch.randn(9, 23).to(dtype)
    # the sum over the blocks has one more rounding for each of them, in float32
    check(linear_grad_input(grad, weight), grad, dense(weight))


@every_kind
@every_float
def test_any_number_of_threads_gives_the_product(dtype: torch.dtype, kind):
    weight, x = make_weight(kind, 67, 144), torch.randn(5, 144).to(dtype)
    args = (x, weight, None)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for run in every_way(args).values():
            check(run(*args), x, dense(weight).T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_python_threads_do_not_write_into_each_others_buffers(dtype: torch.dtype):
    torch.set_num_threads(1)
    cases = [(make_weight(kind, 67, 144), torch.randn(9, 144).to(dtype)) for kind in KINDS.values()]

    def run(case: tuple[Any, torch.Tensor]) -> list[torch.Tensor]:
        weight, x = case
        return [linear(x, weight, None) for _ in range(50)]

    with ThreadPoolExecutor(4) as pool:
        for (weight, x), results in zip(cases, pool.map(run, cases), strict=True):
            for made in results:
                check(made, x, dense(weight).T)


# ---------------------------------------------------------------------------------------------------- gradients


@every_kind
@every_float
def test_gradients_are_those_of_a_dense_linear(dtype: torch.dtype, kind):
    weight, turn = make_weight(kind, 7, 48), turn_of(kind, dtype)
    # over the dtypes each kind meets all of them
    for lead in (LEADS[(turn + step) % 6] for step in (0, 3)):
        x, bias = torch.randn(*lead, 48).to(dtype).requires_grad_(), torch.randn(7).to(dtype).requires_grad_()
        grad = torch.randn(*lead, 7).to(dtype)
        linear(x, weight, bias).backward(grad)
        check(x.grad.view(-1, 48), grad.view(-1, 7), dense(weight))
        check(bias.grad, torch.ones(grad.view(-1, 7).shape[0]), grad.view(-1, 7))


@pytest.mark.parametrize("wanted", ["x", "bias"])
def test_a_gradient_is_made_only_for_what_wants_one(wanted: str):
    weight = make_weight(KINDS["int4"], 7, 48)
    x, bias = torch.randn(3, 48, requires_grad=wanted == "x"), torch.randn(7, requires_grad=wanted == "bias")
    linear(x, weight, bias).sum().backward()
    assert (x.grad is not None, bias.grad is not None) == (wanted == "x", wanted == "bias")


def test_a_weight_without_rows_has_an_input_gradient_of_zeros():
    weight, x = make_weight(KINDS["int4"], 0, 48), torch.randn(3, 48, requires_grad=True)
    linear(x, weight, None).sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, 48))


@every_kind
def test_the_backward_pass_keeps_the_packed_weight_and_nothing_else(kind):
    weight, saved = make_weight(kind, 67, 144), []
    x = torch.randn(3, 144, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x, weight, None)
    stored = {tensor.data_ptr() for tensor in weight.stored if tensor is not None}
    assert saved
    assert {tensor.data_ptr() for tensor in saved} == stored


# ---------------------------------------------------------------------------------------------------- errors

X, B = torch.randn(3, 40), torch.randn(5)
W = make_weight(("int4", 16, True), 5, 40)
P, S, Z, *R = W
BAD = {
    "x-0-d": ((torch.tensor(1.0), W, B), ["at least 1 dimension", "()"]),
    "x-dtype": ((X.double(), W, B), ["torch.float64", "float32, bfloat16 or float16"]),
    "x-integer": ((X.long(), W, B), ["torch.int64", "float32, bfloat16 or float16"]),
    "x-width": ((X[:, :38], W, B), ["(..., 40)", "(3, 38)"]),
    "columns": ((X[:, :38], W._replace(in_features=38), B), ["38 columns", "(rows, 19)", "(5, 20)"]),
    "codes-dtype": ((X, W._replace(packed=P.to(torch.int8)), B), ["torch.uint8", "torch.int8"]),
    "scale-shape": ((X, W._replace(scale=S[:, :1]), B), ["scale", "(5, 3)", "(5, 1)"]),
    "zero-shape": ((X, W._replace(zero=Z[:1]), B), ["zero", "(5, 3)", "(1, 3)"]),
    "bias-length": ((X, W, B[:4]), ["(4,)", "5 features"]),
    "bias-2-d": ((X, W, B[None]), ["(1, 5)", "5 features"]),
    "bias-dtype": ((X, W, B.half()), ["torch.float16", "torch.float32"]),
    "qtype": ((X, W._replace(qtype="int3"), B), ["'int3'", "int2", "int4"]),
}


@pytest.mark.parametrize("args, said", BAD.values(), ids=BAD)
def test_what_does_not_fit_together_is_an_error_before_anything_runs(args, said, monkeypatch):
    ran = []
    monkeypatch.setattr(linear_op, "kernels", [])
    monkeypatch.setattr(linear_op, "reference", lambda *args: ran.append(args))
    for op in (linear, linear_op, linear_op.in_graph):
        with pytest.raises(ValueError) as caught:
            op(*args)
        assert all(text in str(caught.value) for text in said)
    assert not ran


def test_a_gradient_of_another_width_is_an_error():
    with pytest.raises(ValueError, match="has 4 features, but the weight has 5 rows"):
        linear_grad_input(torch.randn(3, 4), W)
