"""int8 weights times int8 activations: what the native kernel computes is the rounding that is promised, exactly."""

import pytest
import torch

from quanto_hf.ops.cpu.call import native_linear
from quanto_hf.ops.cpu.library import NATIVE

pytestmark = pytest.mark.skipif(
    NATIVE is None or not NATIVE.has_kernel("linear_int8"), reason="no native int8 product on this processor"
)
# float32 sums of exact integers; then the rounding of the result
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def make(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + columns)
    codes = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    return codes, torch.rand(rows, 1, generator=generator) + 0.5


def expected(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    values = x.float()
    most = values.abs().amax(1, keepdim=True)
    step = torch.where(most == 0, 1.0, most / 127)
    return (((values / step).round() * step.double()) @ (codes.double() * scale.double()).T).double()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rows, columns", [(1, 1), (17, 200), (33, 513), (96, 1000), (5, 2049), (300, 64)])
@pytest.mark.parametrize("batch", [1, 2, 3, 7, 8, 9, 16, 17, 33, 127, 600])
def test_the_product_of_rounded_rows_is_exact(batch, rows, columns, dtype):
    codes, scale = make(rows, columns)
    x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch)).to(dtype)
    wanted = expected(x, codes, scale)
    got = native_linear(x, codes, scale, None, None, "int8", -1, activations="int8").double()
    size = x.double().abs() @ (codes.double() * scale).abs().T + 1e-30
    assert ((got - wanted).abs() <= TOLERANCE[dtype] * wanted.abs() + 1e-6 * size).all()


@pytest.mark.parametrize("batch", [3, 20])
def test_a_row_of_zeros_gives_the_bias_and_a_row_with_nan_or_infinity_gives_nan(batch):
    codes, scale = make(40, 100)
    x = torch.randn(batch, 100)
    x[0] = 0
    x[1, 7], x[2, 99] = torch.nan, -torch.inf
    bias = torch.randn(40)
    got = native_linear(x, codes, scale, None, bias, "int8", -1, activations="int8")
    assert torch.equal(got[0], bias)
    assert got[1:3].isnan().all() and got[3:].isfinite().all()


def test_threads_do_not_change_a_bit():
    codes, scale = make(333, 500)
    before = torch.get_num_threads()
    try:
        for batch in (1, 8, 40):
            x = torch.randn(batch, 500).bfloat16()
            results = []
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                results.append(native_linear(x, codes, scale, None, None, "int8", -1, activations="int8"))
            assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(before)
