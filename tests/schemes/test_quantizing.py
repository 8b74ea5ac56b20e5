"""A native quantizer that is wrong on this machine is reported once, never used, and the result is that of torch."""

import ctypes
import warnings

import pytest
import torch
from native_weights import needs_native

from quanto_hf.ops.cpu.library import NATIVE
from quanto_hf.ops.registry import why_kernel_wrong
from quanto_hf.schemes import make_scheme

pytestmark = needs_native

CASES = [
    ("int8", "absmax"),
    ("int4", "mse_gain"),
    ("int4", "hqq"),
    ("int2", "minmax"),
    ("nf4", "mse"),
    ("float8", None),
]


@pytest.fixture(autouse=True)
def _nothing_is_known():
    why_kernel_wrong.cache_clear()
    yield
    why_kernel_wrong.cache_clear()


@pytest.mark.parametrize("qtype, fit", CASES)
@pytest.mark.parametrize("scale", [0.5, torch.nan], ids=["half", "nan"])
def test_a_wrong_quantizer_is_reported_once_and_never_used(qtype, fit, scale, monkeypatch):
    scheme, weight, right = make_scheme(qtype), torch.randn(33, 200), NATIVE.quantize

    def wrong(rows: int, packed: int, scales: int, *rest: int) -> bool:
        """Scales that are half as large, or NaN, for weights of any shape."""
        finite = right(rows, packed, scales, *rest)
        n, k, group = rest[4], rest[5], rest[7]
        count = n * (-(-k // group) if group else 1)
        tensor = torch.empty(0, dtype=scheme.scale_type.dtype)
        tensor.set_(_memory(scales, count * tensor.element_size()).untyped_storage(), 0, (count,))
        tensor.mul_(scale)
        return finite

    monkeypatch.setattr(NATIVE, "quantize", wrong)
    with pytest.warns(RuntimeWarning, match=f"{NATIVE.level()} quantizer of {scheme} .*disagrees") as caught:
        made = scheme.quantize(weight, fit)
        again = scheme.quantize(weight, fit)
    assert len(caught) == 1
    monkeypatch.setenv("QUANTO_HF_REFERENCE", "1")
    for name, tensor in scheme.quantize(weight, fit).items():
        assert torch.equal(made[name], tensor) and torch.equal(again[name], tensor)


def _memory(address: int, nbytes: int) -> torch.Tensor:
    """The bytes at an address, as a tensor that shares them."""
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)


@pytest.mark.parametrize("qtype, fit", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_right_one_is_checked_without_a_word(qtype, fit, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_scheme(qtype).quantize(torch.randn(4, 96).to(dtype), fit)
    assert why_kernel_wrong.cache_info().currsize == 1


def test_the_first_call_may_stand_under_autocast_and_inference_mode():
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        make_scheme("int4").quantize(torch.randn(4, 96), "mse")
    assert why_kernel_wrong.cache_info().currsize == 1
