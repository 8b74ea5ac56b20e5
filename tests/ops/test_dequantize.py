"""The op ``dequantize``: (number - zero) * scale for each group, to the last rounding, and its errors."""

import importlib

import pytest
import torch

from quanto_hf.ops import GroupedWeight, dequantize, dequantize_op, groups, pack
from quanto_hf.ops.decode import decode_reference
from quanto_hf.qtypes import QTYPES

module = importlib.import_module("quanto_hf.ops.grouped_weight")

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
every_qtype = pytest.mark.parametrize("qtype", QTYPES)
every_float = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)

# What is smaller than the smallest normal float16 is rounded to a multiple of 2^-24
SUBNORMAL = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2**-25}


def make_weight(
    qtype: str, rows: int, columns: int, group_size: int, zero: bool = False, scale_dtype: torch.dtype = torch.bfloat16
) -> GroupedWeight:
    kind = QTYPES[qtype]
    if kind.float_dtype is not None:
        codes = (torch.randn(rows, columns) * 50).to(kind.float_dtype).view(torch.uint8)
    else:
        codes = torch.randint(0, kind.levels, (rows, columns)).to(torch.uint8).view(kind.storage)
    shape = (rows, groups(columns, group_size))
    scale = (torch.randn(shape) * 0.1).to(scale_dtype)
    offset = (torch.rand(shape) * kind.levels).to(scale_dtype) if zero else None
    return GroupedWeight(pack(codes, kind.bits), scale, offset, qtype, group_size, columns)


def definition(weight: GroupedWeight) -> torch.Tensor:
    """(number - zero) * scale in float64, one scale for each column."""
    packed, scale, zero, qtype, group_size, columns = weight
    kind = QTYPES[qtype]
    group = torch.arange(columns) // (group_size if group_size > 0 else columns)
    offset = {"int4": 8.0, "int2": 2.0}.get(qtype, 0.0) if zero is None else zero.double()[:, group]
    return (decode_reference(packed, kind, columns).double() - offset) * scale.double()[:, group]


@every_qtype
@every_float
@pytest.mark.parametrize("group_size", [-1, 16, 64], ids=["channel", "g16", "g64"])
@pytest.mark.parametrize("zero", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=["scale32", "scale16"])
def test_every_kernel_is_within_two_roundings_of_the_definition(qtype, dtype, group_size, zero, scale_dtype):
    # 77 columns end in a short group for both group sizes
    weight = make_weight(qtype, 9, 77, group_size, zero, scale_dtype)
    exact = definition(weight)
    # One rounding of the difference (or of the table's value) and one of the product, half a unit in the last place
    # each. float32 work and float16 results have the second rounding in the result.
    bound = exact.abs() * torch.finfo(dtype).eps * 1.01 + SUBNORMAL[dtype]
    for run in (dequantize, dequantize_op.reference, *(kernel.run for kernel in dequantize_op.kernels)):
        made = run(weight, dtype)
        assert made.dtype == dtype
        assert ((made.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(
    "qtype, code, expected",
    [
        ("int4", 8, 0.0),
        ("int4", 0, -4.0),
        ("int2", 3, 0.5),
        ("int8", 2, 1.0),
        ("float8_e4m3fn", 0x38, 0.5),
        ("fp4", 7, 3),
    ],
    ids=str,
)
def test_a_symmetric_code_of_scale_one_half_stands_for(qtype: str, code: int, expected: float):
    kind = QTYPES[qtype]
    packed = pack(torch.tensor([[code]], dtype=torch.uint8), kind.bits).view(kind.storage)
    weight = GroupedWeight(packed, torch.tensor([[0.5]]), None, qtype, -1, 1)
    assert dequantize(weight, torch.float32).item() == expected


@every_qtype
@every_float
@pytest.mark.parametrize("block_bytes", [1, 1000], ids=["one-row", "some-rows"])
def test_the_size_of_the_blocks_changes_nothing(qtype: str, dtype: torch.dtype, block_bytes: int, monkeypatch):
    weight = make_weight(qtype, 11, 77, 32)
    whole = dequantize(weight, dtype)
    monkeypatch.setattr(module, "BLOCK_WEIGHT_BYTES", block_bytes)
    assert module.block_rows(77, dtype) < 11
    assert torch.equal(dequantize(weight, dtype), whole)


@every_qtype
def test_a_weight_survives_the_making_of_the_next_one(qtype: str):
    first = dequantize(make_weight(qtype, 5, 40, 16), torch.float16)
    kept = first.clone()
    dequantize(make_weight(qtype, 5, 40, 16), torch.float16)
    assert torch.equal(first, kept)


@every_qtype
def test_the_stored_tensors_are_not_written_to(qtype: str):
    weight = make_weight(qtype, 5, 40, 16, zero=True)
    before = [tensor.clone() for tensor in weight.stored]
    for run in (dequantize, dequantize_op.reference):
        run(weight, torch.float32)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(weight.stored, before, strict=True))


@every_qtype
def test_a_weight_without_rows_has_no_values(qtype: str):
    assert dequantize(make_weight(qtype, 0, 40, 16), torch.float32).shape == (0, 40)


def test_groups_are_counted_with_the_shorter_last_one():
    assert [groups(n, 32) for n in (1, 32, 33, 64)] == [1, 1, 2, 2]
    assert groups(1000, -1) == 1


P, S, Z, *_ = make_weight("int4", 3, 40, 16, zero=True)
BAD = {
    "width": ((P[:, :-1], S, Z, "int4", 16, 40, torch.float32), ["(rows, 20)", "(3, 19)"]),
    "columns": ((P, S, Z, "int4", 16, 42, torch.float32), ["42 columns", "(rows, 21)", "(3, 20)"]),
    "codes-dtype": ((P.to(torch.int32), S, Z, "int4", 16, 40, torch.float32), ["torch.uint8", "torch.int32"]),
    "codes-1-d": ((P[0], S, Z, "int4", 16, 40, torch.float32), ["(rows, 20)", "(20,)"]),
    "scale-groups": ((P, S[:, :2], Z, "int4", 16, 40, torch.float32), ["scale", "(3, 3)", "(3, 2)"]),
    "scale-rows": ((P, S[:2], Z, "int4", 16, 40, torch.float32), ["scale", "(3, 3)", "(2, 3)"]),
    "scale-dtype": ((P, S.double(), Z, "int4", 16, 40, torch.float32), ["scale", "torch.float64"]),
    "zero-shape": ((P, S, Z[:, :1], "int4", 16, 40, torch.float32), ["zero", "(3, 3)", "(3, 1)"]),
    "zero-dtype": ((P, S, Z.float(), "int4", 16, 40, torch.float32), ["zero", "torch.bfloat16", "torch.float32"]),
    "result-dtype": ((P, S, Z, "int4", 16, 40, torch.float64), ["torch.float64", "torch.float32", "torch.bfloat16"]),
    "qtype": ((P, S, Z, "int3", 16, 40, torch.float32), ["'int3'", "int2", "int4", "nf4"]),
}


@pytest.mark.parametrize("args, said", BAD.values(), ids=BAD)
def test_what_does_not_fit_together_is_an_error_before_anything_runs(args, said, monkeypatch):
    ran = []
    monkeypatch.setattr(dequantize_op, "kernels", [])
    monkeypatch.setattr(dequantize_op, "reference", lambda *args: ran.append(args))
    for op in (dequantize_op, dequantize_op.in_graph):
        with pytest.raises(ValueError) as caught:
            op(GroupedWeight(*args[:-1]), args[-1])
        assert all(text in str(caught.value) for text in said)
    assert not ran
