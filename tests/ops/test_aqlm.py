"""The ops of additive quantization: their definition, their kernels, and the gradient to the input.

What holds for every op is in test_registry.py. Rows B3 and B5 are those of the AQLM feature list.
"""

import doctest
import importlib

import pytest
import torch
import torch.nn.functional as F
from native_weights import LEVELS, needs_native

from quanto_hf.ops import AqlmWeight, code_dtype, dequantize, dequantize_op, linear, linear_op
from quanto_hf.ops.aqlm_weight import SAMPLE_LAYOUTS, sample_aqlm
from quanto_hf.ops.cpu.library import NATIVE
from quanto_hf.ops.registry import why_kernel_wrong

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
every_float = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
every_level = pytest.mark.parametrize("on_level", LEVELS, indirect=True)
IDS = ["{2}x{3}-{4}x{5}".format(*layout) for layout in SAMPLE_LAYOUTS]
every_weight = pytest.mark.parametrize("weight", sample_aqlm(), ids=IDS)


def draw(lines, groups, count, nbits, out_group=1, in_group=8, dtype=torch.float32):
    """codes, codebooks and scales."""
    generator = torch.Generator().manual_seed(lines + nbits)
    half = 1 << (nbits - 1)
    codes = torch.randint(-half, half, (lines, groups, count), generator=generator).to(code_dtype(nbits))
    books = torch.randn((count, 1 << nbits, out_group, in_group), generator=generator)
    return AqlmWeight(codes, books.to(dtype), (torch.rand((lines, 1, 1, 1), generator=generator) + 0.5).to(dtype))


@pytest.fixture
def on_level(request):
    """Run on one level of instructions."""
    before = NATIVE.level()
    NATIVE.use_level(request.param)
    yield request.param
    NATIVE.use_level(before)


def exact(x, weight):
    """The product in float64, and the bound of float32 sums for each output."""
    weight = weight.dense(torch.float32).double()
    return F.linear(x.double(), weight), F.linear(x.double().abs(), weight.abs())


@every_weight
def test_the_definition_is_a_sum_of_entries_times_the_scale(weight):
    codes, books, scales = weight
    made = dequantize_op.reference(weight, torch.float32)
    _, size, out_group, in_group = books.shape
    for o, i in ((0, 0), (made.shape[0] - 1, made.shape[1] - 1), (made.shape[0] // 2, made.shape[1] // 3)):
        named = codes[o // out_group, i // in_group].tolist()
        total = sum(float(books[k, code % size, o % out_group, i % in_group]) for k, code in enumerate(named))
        assert made[o, i] == pytest.approx(total * float(scales[o // out_group]), rel=1e-6)


@every_level
@needs_native
@every_weight
def test_dequantizing_is_exact_on_every_level(weight, on_level):
    for dtype in FLOATS.values():
        made = dequantize(weight, dtype)
        assert torch.equal(made, dequantize_op.reference(weight, dtype))
    kernel = next(kernel for kernel in dequantize_op.kernels if kernel.name == "native")
    assert kernel.refuses(weight, torch.float32) is None


@every_level
@needs_native
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 17, 33, 64])
@every_float
def test_b3_products_are_those_of_the_dequantized_weight(rows, dtype, on_level):
    # tables, rows and panels; chunks of 512 columns and a rest, rows of the weight that fill no tile
    bound = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    layouts = [(45, 131, 2, 8), (45, 131, 1, 8), (33, 131, 1, 11), (7, 67, 3, 8, 2, 16), (9, 30, 2, 5, 1, 24)]
    for layout in [
        *layouts,
        (31, 63, 3, 8),
        (29, 66, 2, 6),
        (53, 1, 1, 8),
        (3, 129, 9, 8),
        (3, 65, 2, 9),
        (27, 65, 1, 7),
    ]:
        weight = draw(*layout)
        x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(rows)).to(dtype)
        made, (wanted, size) = linear(x, weight, None), exact(x, weight)
        assert ((made.double() - wanted).abs() <= bound * size + 1e-30).all(), layout


@needs_native
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 20])
@pytest.mark.parametrize("layout", [(256, 64, 2, 8), (256, 64, 1, 8), (256, 64, 1, 16), (32, 64, 2, 8, 8)], ids=str)
@every_float
def test_b3_any_number_of_threads_gives_the_same_bits(layout, rows, dtype):
    weight = draw(*layout, dtype=torch.float16)
    x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4, 8):
            torch.set_num_threads(threads)
            made += [linear(x, weight, None) for _ in range(25 if rows < 8 else 5)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, made[0]) for one in made)


@needs_native
@pytest.mark.parametrize("big, small", [(1e38, 1e-37), (1e-38, 1e37), (1e30, 1e-20)])
@pytest.mark.parametrize("rows", [1, 4, 8, 20])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_b3_no_number_leaves_the_range_of_float32_on_the_way(big, small, rows, count):
    codes, books, scales = draw(19, 40, count, 8)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 6e-3)):
        x = (torch.randn(rows, 320, generator=torch.Generator().manual_seed(3)).clamp(-3, 3) * big).to(dtype)
        made, (wanted, size) = (
            linear(x, AqlmWeight(codes, books, scales * small), None),
            exact(x, AqlmWeight(codes, books, scales * small)),
        )
        assert torch.isfinite(made).all() and ((made.double() - wanted).abs() <= bound * size).all()


@needs_native
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("rows", [2, 8, 9, 33])
@pytest.mark.parametrize("layout", [(5, 6, 2, 8), (5, 6, 1, 8), (5, 6, 1, 12), (5, 6, 3, 8)], ids=str)
@every_float
def test_b3_what_is_not_finite_reaches_the_outputs_that_it_belongs_to(bad, rows, layout, dtype):
    codes, books, scales = draw(*layout)
    x = torch.randn(rows, 48).to(dtype)
    x[1, 7] = bad
    made = linear(x, AqlmWeight(codes, books, scales), None)
    others = torch.arange(rows) != 1
    assert torch.isfinite(made[others]).all() and not torch.isfinite(made[1]).any()


@needs_native
@pytest.mark.parametrize("rows", [1, 3, 9, 33])
@every_float
def test_b3_an_entry_or_a_scale_that_is_not_finite_stays_in_its_rows(rows, dtype):
    codes, books, scales = draw(40, 13, 2, 8)
    books[0, 5, 0, 3], scales[7] = torch.inf, torch.nan
    hit = (codes[..., 0] & 255 == 5).any(1)
    hit[7] = True
    assert not hit.all()
    made = linear(torch.rand(rows, 104).to(dtype) + 1, AqlmWeight(codes, books, scales), None)
    assert torch.isfinite(made[:, ~hit]).all() and not torch.isfinite(made[:, hit]).any()


@needs_native
@pytest.mark.parametrize("book", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_b3_codebooks_of_another_dtype_than_x_are_multiplied(book, count):
    codes, books, scales = draw(37, 21, count, 8, dtype=book)
    for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 6e-3)):
        for rows in (1, 4, 16):
            x = torch.randn(rows, 168, generator=torch.Generator().manual_seed(rows)).to(dtype)
            weight = AqlmWeight(codes, books, scales)
            made, (wanted, size) = linear(x, weight, None), exact(x, weight)
            assert ((made.double() - wanted).abs() <= bound * size + 1e-30).all(), (dtype, rows)


@every_weight
@every_float
def test_b5_the_gradient_to_the_input_is_that_of_the_dense_weight(weight, dtype):
    codes, books, scales = weight
    rows, columns = weight.shape
    x = torch.randn(3, columns, dtype=dtype, requires_grad=True)
    bias = torch.randn(rows, dtype=dtype, requires_grad=True)
    grad = torch.randn(3, rows).to(dtype)
    linear(x, AqlmWeight(codes, books, scales), bias).backward(grad)
    dense = weight.dense(torch.float32)
    wanted = grad.float() @ dense
    bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert (x.grad.float() - wanted).norm() <= bound * wanted.norm()
    assert torch.equal(bias.grad, grad.sum(0)) or dtype is not torch.float32


@pytest.mark.parametrize("shape", [(96,), (0, 96), (2, 0, 96), (2, 9, 96)], ids=str)
def test_any_shape_of_the_input_is_multiplied(shape):
    weight = draw(5, 12, 2, 8)
    x, bias = torch.randn(shape), torch.randn(5)
    made = linear(x, weight, bias)
    assert made.shape == (*shape[:-1], 5)
    torch.testing.assert_close(made, linear_op.reference(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_a_weight_without_rows_gives_outputs_without_features():
    codes, books, scales = draw(5, 12, 2, 8)
    assert linear(torch.randn(3, 96), AqlmWeight(codes[:0], books, scales[:0]), None).shape == (3, 0)


def test_views_that_are_not_contiguous_are_read_as_they_are():
    codes, books, scales = draw(8, 12, 2, 8)
    x = torch.randn(96, 3).T
    made = linear(x, AqlmWeight(codes[::2], books, scales[::2]), None)
    torch.testing.assert_close(made, linear_op.reference(x, AqlmWeight(codes[::2], books, scales[::2]), None))


WRONG = {
    "codes-dtype": (lambda c, b, s, x: (x, c.to(torch.int16), b, s), ["codes for 2 codebooks of 8 bits", "torch.int8"]),
    "codes-count": (lambda c, b, s, x: (x, c[..., :1], b, s), ["codes for 2 codebooks", "(5, 12, 1)"]),
    "books-size": (lambda c, b, s, x: (x, c, b[:, :255], s), ["a power of 2", "255"]),
    "books-dim": (lambda c, b, s, x: (x, c, b[0], s), ["codebooks have shape", "(256, 1, 8)"]),
    "scales": (lambda c, b, s, x: (x, c, b, s[:4]), ["scales of 5 row groups", "(4, 1, 1, 1)"]),
    "input": (lambda c, b, s, x: (x[:, :95], c, b, s), ["(..., 96)", "(3, 95)"]),
    "input-dtype": (lambda c, b, s, x: (x.double(), c, b, s), ["float32, bfloat16 or float16", "torch.float64"]),
    "device": (lambda c, b, s, x: (x, c, b.to("meta"), s), ["codebooks are on meta"]),
}


@pytest.mark.parametrize("damage, said", WRONG.values(), ids=WRONG)
def test_b12_what_does_not_fit_together_is_named(damage, said):
    with pytest.raises(ValueError) as caught:
        x, *stored = damage(*draw(5, 12, 2, 8), torch.randn(3, 96))
        linear(x, AqlmWeight(*stored), None)
    assert all(text in str(caught.value) for text in said), str(caught.value)


@needs_native
def test_a_kernel_that_is_wrong_is_not_used(monkeypatch):
    why_kernel_wrong.cache_clear()
    monkeypatch.setattr(linear_op, "errors", lambda *args: [(1.0, 0.0)])
    weight, x = draw(5, 12, 2, 8), torch.randn(1, 96)
    with pytest.warns(RuntimeWarning, match="kernel for AQLM weights of 8 bits"):
        assert linear_op.explain(x, weight, None)[1] == ("torch_blocks", "runs")
    why_kernel_wrong.cache_clear()


def test_the_examples_in_the_docstrings_are_true():
    result = doctest.testmod(importlib.import_module("quanto_hf.ops.aqlm_weight"))
    assert result.attempted and not result.failed
