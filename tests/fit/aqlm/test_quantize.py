"""Whole weights: the errors that are promised (rows B8 and B9), the same bits again, awkward sizes, mistakes."""

import pytest
import torch
from fit.aqlm.problems import gptq, inputs, moment, relative
from native_weights import needs_native

from quanto_hf.fit.aqlm import Layout, loops, quantize_aqlm
from quanto_hf.schemes import Aqlm


def outliers(size: int) -> torch.Tensor:
    """Normal values, one of a thousand 10 times as large."""
    weight = torch.randn(size, size)
    weight[torch.rand(size, size) < 0.001] *= 10
    return weight


@needs_native
@pytest.mark.parametrize("make, most", [(torch.randn, 0.315), (outliers, 0.32)], ids=["normal", "outliers"])
def test_b8_with_no_data_3_iterations_of_2x8_reach_the_error_that_is_promised(make, most):
    weight = make(1024, 1024) if make is torch.randn else make(1024)
    made = quantize_aqlm(weight, num_codebooks=2, nbits=8, iterations=3, dtype=torch.float16)
    assert relative(weight, made.dequantize()) <= most


def test_b9_with_data_the_error_of_outputs_is_below_data_free_and_below_int2_gptq_at_more_bits():
    weight, seen, held_out = torch.randn(512, 512), inputs(1500, 512, 1), inputs(500, 512, 2)
    made = {
        name: relative(weight, quantize_aqlm(weight, num_codebooks=2, nbits=8, hessian=hessian).dequantize(), held_out)
        for name, hessian in (("free", None), ("data", moment(seen)))
    }
    others = [
        relative(weight, gptq(weight, moment(seen), "int2", act_order=order), held_out) for order in (False, True)
    ]
    # 2 bits, a scale and a zero of 16 bits for 64 columns
    assert Aqlm(2, 8).bits((512, 512)) <= 2.5
    assert made["data"] < 0.75 * made["free"]
    assert made["data"] < 0.9 * min(others)


@needs_native
@pytest.mark.parametrize("calibrated", [False, True], ids=["free", "data"])
@pytest.mark.parametrize("layout", [Layout(2, 6), Layout(1, 9, 2, 4)], ids=str)
def test_the_result_is_the_same_to_the_last_bit_for_any_number_of_threads(calibrated, layout):
    weight, found = torch.randn(100, 136), []
    hessian = moment(inputs(300, 136, 0)) if calibrated else None
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.append(quantize_aqlm(weight, **layout.__dict__, hessian=hessian))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("out_group, in_group, shape", [(1, 8, (16, 8)), (2, 4, (20, 4)), (1, 16, (1, 16))])
def test_a_weight_of_one_column_group_gives_the_same_bits_again(out_group, in_group, shape):
    # the moment of constant inputs has rank 1, so that errors of rounding would decide which codes are chosen
    weight, hessian = torch.randn(shape), torch.ones(shape[1], shape[1])

    def made():
        # memory that is free for the next call has other values
        del [torch.randn(size + 1, 7) for size in range(torch.randint(20, ()))][:]
        return quantize_aqlm(
            weight, num_codebooks=1, nbits=3, out_group=out_group, in_group=in_group, hessian=hessian
        )  # fmt: skip

    first = made()
    for _ in range(30):
        assert all(torch.equal(a, b) for a, b in zip(first, made(), strict=True))


def test_a_seed_decides():
    weight = torch.randn(40, 64)
    first, again, other = (quantize_aqlm(weight, num_codebooks=2, nbits=4, seed=seed).codes for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


# rows, columns, layout
AWKWARD = [
    (1, 8, Layout(1, 8)), (1, 24, Layout(3, 1)), (3, 40, Layout(2, 3, 3, 5)), (7, 1, Layout(2, 2, 1, 1)),
    (33, 72, Layout(8, 8, 1, 8)), (64, 16, Layout(2, 5, 8, 16)), (20, 32, Layout(1, 12, 2, 4)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, columns, layout", AWKWARD)
@pytest.mark.parametrize("calibrated", [False, True], ids=["free", "data"])
def test_awkward_sizes(rows, columns, layout, dtype, calibrated):
    weight = torch.randn(rows, columns).to(dtype)
    hessian = moment(torch.randn(60, columns)) if calibrated else None
    codes, codebooks, scales = made = quantize_aqlm(weight, **layout.__dict__, hessian=hessian, iterations=2)
    grid = layout.grid((rows, columns))
    assert codes.shape == (*grid, layout.num_codebooks) and codes.dtype == layout.code_dtype
    assert codebooks.shape == (layout.num_codebooks, layout.size, layout.out_group, layout.in_group)
    assert scales.shape == (grid[0], 1, 1, 1) and codebooks.dtype == scales.dtype == dtype
    assert relative(weight, made.dequantize()) < 1.1
    if not calibrated:
        assert relative(weight, made.dequantize()) < 0.95


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
@pytest.mark.parametrize("calibrated", [False, True], ids=["free", "data"])
def test_huge_and_tiny_weights_have_the_same_error(scale, calibrated):
    weight, hessian = torch.randn(48, 64), moment(inputs(100, 64, 0)) if calibrated else None
    errors = [
        relative(weight * s, quantize_aqlm(weight * s, num_codebooks=2, nbits=4, hessian=hessian).dequantize() / 1)
        if s == 1
        else relative(weight, quantize_aqlm(weight * s, num_codebooks=2, nbits=4, hessian=hessian).dequantize() / s)
        for s in (1, scale)
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize("calibrated", [False, True], ids=["free", "data"])
def test_rows_of_zeros_stay_zero(calibrated):
    weight, hessian = torch.randn(16, 32), moment(inputs(50, 32, 0)) if calibrated else None
    weight[[0, 7]] = 0
    made = quantize_aqlm(weight, num_codebooks=2, nbits=4, hessian=hessian).dequantize()
    assert (made[[0, 7]] == 0).all() and relative(weight, made) < 1
    assert (quantize_aqlm(torch.zeros(16, 32), num_codebooks=2, nbits=4, hessian=hessian).dequantize() == 0).all()


def test_what_a_codebook_can_hold_is_met_exactly():
    vectors, scales = torch.randn(16, 8), torch.rand(64, 1) + 0.5
    weight = vectors[torch.randint(16, (64, 8))].flatten(1) * scales
    made = quantize_aqlm(weight, num_codebooks=2, nbits=6, iterations=20).dequantize()
    assert relative(weight, made) < 0.02


def test_codebooks_and_scales_are_rounded_before_the_codes_are_chosen():
    weight = torch.randn(64, 64)
    made = quantize_aqlm(weight, num_codebooks=1, nbits=6, dtype=torch.bfloat16)
    targets = (weight / made.scales.float().view(-1, 1)).view(64, 8, 8)
    nearest = torch.cdist(targets, made.codebooks[0, :, 0].float().expand(64, -1, -1)).argmin(-1)
    assert (nearest == made.codes[..., 0]).float().mean() > 0.999


@pytest.mark.parametrize("calibrated", [False, True], ids=["free", "data"])
def test_in_torch_alone_the_error_is_the_same(calibrated, monkeypatch):
    weight, hessian = torch.randn(96, 128), moment(inputs(300, 128, 0)) if calibrated else None
    x = inputs(300, 128, 0) if calibrated else None
    error = relative(weight, quantize_aqlm(weight, num_codebooks=2, nbits=5, hessian=hessian).dequantize(), x)
    monkeypatch.setattr(loops, "runs_native", lambda device: False)
    alone = relative(weight, quantize_aqlm(weight, num_codebooks=2, nbits=5, hessian=hessian).dequantize(), x)
    assert alone == pytest.approx(error, rel=0.01)


def test_the_caller_hears_how_far_it_is():
    heard = []
    quantize_aqlm(torch.randn(8, 16), num_codebooks=1, nbits=2, iterations=3, progress=lambda *a: heard.append(a))
    assert heard == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_the_weight_and_its_gradient_are_left_alone():
    weight = torch.randn(8, 16, requires_grad=True)
    before = weight.detach().clone()
    with torch.autocast("cpu"):
        made = quantize_aqlm(weight, num_codebooks=1, nbits=2)
    assert torch.equal(weight, before) and not made.codebooks.requires_grad and made.scales.dtype == torch.float32


@pytest.mark.parametrize(
    "weight, values, text",
    [
        (torch.randn(8, 20), {}, "in_features=20 is not a multiple of in_group=8"),
        (torch.randn(9, 16), {"out_group": 2}, "out_features=9 is not a multiple of out_group=2"),
        (torch.randn(0, 16), {}, "out_features=0"),
        (torch.randn(2, 8, 16), {}, r"the shape \[2, 8, 16\]"),
        (torch.full((8, 16), torch.nan), {}, "NaN or infinite"),
        (torch.ones(8, 16, dtype=torch.int32), {}, "must be floats"),
        (torch.randn(8, 16), {"hessian": torch.eye(8)}, r"shape \[8, 8\]; for this weight it must be \[16, 16\]"),
        (torch.randn(8, 16), {"hessian": torch.full((16, 16), torch.inf)}, "NaN or infinite"),
        (torch.randn(8, 16), {"iterations": 0}, "iterations=0"),
        (torch.randn(8, 16), {"beam": 65}, "beam=65 is out of range; choose 1 to 64"),
        (torch.randn(8, 16) * 1e9, {"dtype": torch.float16}, "out of the range of torch.float16"),
    ],
)
def test_mistakes_are_named(weight, values, text):
    with pytest.raises(ValueError, match=text):
        quantize_aqlm(weight, num_codebooks=1, nbits=2, **values)
