"""The native kernel of ``embedding``: to the bit the rows that ``dequantize`` makes."""

import pytest
import torch
from native_weights import Kind, every_float, make_weight, native, needs_native

from quanto_hf.ops import dequantize_op, embedding, embedding_op
from quanto_hf.ops.cpu import call
from quanto_hf.ops.cpu.library import NATIVE
from quanto_hf.ops.registry import why_kernel_wrong

pytestmark = needs_native

KINDS = [Kind("int8", -1), Kind("int8", 7), Kind("int4", 64, True), Kind("int2", 96, True), Kind("float8_e5m2", -1),
         Kind("nf4", 32)]  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


@every_kind
@every_float
@pytest.mark.parametrize("shape", [(1, 1), (17, 200), (33, 513), (96, 1000)], ids=str)
def test_rows_have_the_bits_of_dequantize(level: str, kind: Kind, dtype: torch.dtype, shape: tuple[int, int]):
    weight = make_weight(kind, *shape).rest()
    whole = native(dequantize_op)(*weight, dtype)
    for count in (1, 2, 100):
        index = torch.randint(0, shape[0], (count,))
        made = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            made.append(native(embedding_op)(index, *weight, dtype))
        assert all(torch.equal(one, whole[index]) for one in made)


def test_no_index_is_nothing_to_do(level: str):
    args = (torch.empty(0, 2, dtype=torch.int64), *make_weight(KINDS[0], 5, 40).rest(), torch.float32)
    assert embedding_op.kernels[0].refuses(*args) == "there is nothing to dequantize"
    assert embedding(*args).shape == (0, 2, 40)


@pytest.mark.parametrize("wrong", [-1, 5, 2**40, -(2**63)])
def test_the_library_refuses_a_row_that_python_did_not_see(level: str, wrong: int):
    (weight,) = make_weight(KINDS[2], 5, 40).rest()
    out = torch.full((3, 40), 7.0)
    with pytest.raises(IndexError, match="a row number is not one of 0 to 4"):
        call.native_dequantize(weight, out, torch.tensor([1, wrong, 0]))
    # before anything is written
    assert (out == 7).all()


def test_a_library_that_takes_other_rows_is_found(level: str, monkeypatch):
    right = NATIVE.dequantize

    def spoiled(*args: int) -> bool:
        return right(*args[:9], 0, *args[10:])  # the first rows, whichever were asked for

    monkeypatch.setattr(NATIVE, "dequantize", spoiled)
    why_kernel_wrong.cache_clear()
    args = (torch.tensor([4, 0]), *make_weight(KINDS[2], 5, 200).rest(), torch.float32)
    with pytest.warns(RuntimeWarning, match="disagrees"):
        made = embedding(*args)
    why_kernel_wrong.cache_clear()
    torch.testing.assert_close(made, embedding_op.reference(*args))
