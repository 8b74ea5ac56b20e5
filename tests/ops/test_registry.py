"""What holds for every op and every kernel, known or yet to be written."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from quanto_hf.ops import OPS
from quanto_hf.ops.cpu.library import NATIVE, REASON
from quanto_hf.ops.kernel import Kernel, reference_only
from quanto_hf.ops.registry import Op
from quanto_hf.ops.weight import KINDS, AqlmWeight, GroupedWeight
from quanto_hf.qtypes import QTYPES

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Rounding of a weight to the dtype (at most 3 units in the last place), of the sum, and of the result: the widest
# relative error that the kernels of these sizes may have. test_linear.py has the exact bound for each element.
RTOL = {torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}


def samples(op: Op, dtype: torch.dtype = torch.float32) -> list[tuple[Any, ...]]:
    """The samples with their input or gradient, and their bias, in another dtype."""
    names = [part.split()[-1] for part in op.schema[1:].partition(")")[0].split(",")]
    floats = [name in ("x", "grad", "bias") for name in names]
    return [
        tuple(a.to(dtype) if cast and a is not None else a for a, cast in zip(args, floats, strict=True))
        for args in op.samples(0)
    ]


def of_type(op: Op, args: tuple[Any, ...], qtype: str | None) -> bool:
    """Whether the weight has this number type; None: is one of AQLM."""
    weight = args[op.at]
    return weight.qtype == qtype if isinstance(weight, GroupedWeight) else qtype is None


every_op = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
every_qtype = pytest.mark.parametrize("qtype", QTYPES)


@every_op
@pytest.mark.parametrize("qtype", [*QTYPES, None])
def test_torch_library_finds_no_fault(op: Op, qtype: str | None):
    kind = AqlmWeight if qtype is None else GroupedWeight
    if kind not in op.kinds:
        pytest.skip(f"{op.name} is no operator of torch for such weights")
    cases = [op.flat(args) for args in samples(op) if of_type(op, args, qtype)]
    assert cases
    for args in cases:
        torch.library.opcheck(op.operator(kind), args, test_utils=("test_schema", "test_faketensor"))
    # tracing costs 50 times as much: one shape of AQLM, and of a third of the number types, all of them over the ops
    # (the gradients of products are traced with all, below)
    turn = list(QTYPES).index(qtype) if qtype else 0
    if qtype is None or (turn + turn // 3 + list(OPS).index(op.name)) % 3 == 0:
        torch.library.opcheck(op.operator(kind), cases[-1], test_utils=("test_aot_dispatch_dynamic",))


@every_qtype
@pytest.mark.parametrize("name", ["linear", "expert_linear"])
def test_torch_library_finds_no_fault_in_the_gradients(name: str, qtype: str):
    # one dtype for each type of weights, so that both ops meet all of them
    op, dtype = OPS[name], list(FLOATS.values())[(list(QTYPES).index(qtype) + (name == "linear")) % 3]
    args = [args for args in samples(op, dtype) if of_type(op, args, qtype) and args[-1] is not None][-1]
    for tensor in (args[0], args[-1]):
        tensor.requires_grad_()
    torch.library.opcheck(op.operator(GroupedWeight), op.flat(args))


def result(made: Any) -> torch.Tensor:
    """What an op made, as floats: of a weight, what it stands for."""
    return made.dense(torch.float32) if isinstance(made, KINDS) else made


@every_op
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_every_kernel_agrees_with_the_reference(op: Op, dtype: torch.dtype):
    for args in samples(op, dtype):
        expected = result(op.reference(*args))
        atol = RTOL[expected.dtype] * max(1.0, float(expected.float().abs().max()) if expected.numel() else 1.0)
        for kernel in op.kernels_for(args[op.at]):
            if kernel.refuses(*args) is None:
                made = result(kernel.run(*args))
                torch.testing.assert_close(made, expected, rtol=RTOL[expected.dtype], atol=atol, msg=kernel.name)


@every_op
def test_every_kernel_has_a_sample_that_it_takes(op: Op):
    cases = [args for dtype in FLOATS.values() for args in samples(op, dtype)]
    absent = [kernel for kernel in op.kernels if kernel.name.startswith("native") and NATIVE is None]
    for kernel in op.kernels:
        mine = [args for args in cases if type(args[op.at]) in kernel.kinds]
        if kernel in absent:
            said = {kernel.refuses(*args) for args in mine}
            assert REASON in said and None not in said
            continue
        assert any(kernel.refuses(*args) is None for args in mine), f"the samples of {op.name} never run {kernel.name}"
    if absent:
        pytest.skip(f"{', '.join(kernel.name for kernel in absent)}: {REASON}")


@every_op
def test_the_torch_operator_gives_what_the_op_gives(op: Op):
    for kind in op.kinds:
        args = next(args for args in samples(op) if type(args[op.at]) is kind)
        assert torch.equal(op.in_graph(*args), op(*args))


@every_op
def test_explain_names_the_kernel_that_runs_and_gives_every_other_one_a_sentence(op: Op):
    for args in samples(op, torch.bfloat16):
        rows = op.explain(*args)
        kernels = op.kernels_for(args[op.at])
        assert [name for name, _ in rows] == [*(kernel.name for kernel in kernels), "reference"]
        assert [sentence for _, sentence in rows].count("runs") == 1
        assert all(len(sentence.split()) > 2 for _, sentence in rows if sentence != "runs")


@every_op
def test_the_environment_can_ask_for_the_reference(op: Op, monkeypatch):
    args = samples(op)[0]
    assert op.choose(*args) is not op.reference
    monkeypatch.setenv("QUANTO_HF_REFERENCE", "1")
    assert op.choose(*args) is op.reference
    *others, last = op.explain(*args)
    assert last == ("reference", "runs")
    assert {sentence for _, sentence in others} == {"QUANTO_HF_REFERENCE is set"}


@pytest.mark.parametrize("value", ["", "0"], ids=["empty", "0"])
def test_an_environment_variable_of_0_or_nothing_asks_for_nothing(monkeypatch, value: str):
    monkeypatch.setenv("QUANTO_HF_REFERENCE", value)
    assert not reference_only()


def test_the_first_kernel_without_an_objection_runs(monkeypatch):
    op = OPS["linear"]
    args = samples(op)[0]
    monkeypatch.setattr(op, "kernels", [])
    assert op.choose(*args) is op.reference
    op.kernel("objects", lambda *args: "it never does")(lambda *args: torch.tensor(1.0))
    op.kernel("first", lambda *args: None)(lambda *args: torch.tensor(2.0))
    op.kernel("second", lambda *args: None)(lambda *args: torch.tensor(3.0))
    assert op(*args) == 2.0
    assert op.explain(*args) == [
        ("objects", "it never does"),
        ("first", "runs"),
        ("second", "a kernel before it runs"),
        ("reference", "a kernel before it runs"),
    ]
    assert [type(kernel) for kernel in op.kernels] == [Kernel] * 3


def test_an_op_is_defined_once():
    first = OPS["linear"]
    with pytest.raises(ValueError, match="'linear' is defined already"):
        replace(first)
    assert OPS["linear"] is first
