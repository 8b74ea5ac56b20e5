"""The op ``embedding``: rows of the dequantized weight, whatever chooses them and whoever looks on."""

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from native_weights import FLOATS, Kind, every_float, make_weight
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from quanto_hf.ops import embedding, embedding_op
from quanto_hf.ops.embedding import INTEGERS

blocks = importlib.import_module("quanto_hf.ops.grouped_weight")

KINDS = [Kind("int8", -1), Kind("int4", 64, True), Kind("int2", 16, True), Kind("float8_e4m3fn", -1), Kind("nf4", 32)]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def case(kind: Kind, rows: int = 11, columns: int = 200) -> tuple[Any, ...]:
    return make_weight(kind, rows, columns).rest()


def every_way(args: tuple[Any, ...]) -> list[Any]:
    """All that can run these arguments."""
    kernels = [kernel.run for kernel in embedding_op.kernels if kernel.refuses(*args) is None]
    return [embedding, embedding_op, embedding_op.in_graph, embedding_op.reference, *kernels]


@every_kind
@every_float
@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1,), (5,), (3, 4), (2, 1, 3)], ids=str)
def test_rows_are_those_of_the_dequantized_weight(kind: Kind, dtype: torch.dtype, shape: tuple[int, ...]):
    weight, index = case(kind), torch.randint(0, 11, shape)
    exact = F.embedding(index, weight[0].dense(torch.float32))
    for run in every_way((index, *weight, dtype)):
        made = run(index, *weight, dtype)
        assert made.shape == (*shape, 200) and made.dtype == dtype and made.is_contiguous()
        torch.testing.assert_close(made.float(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2e-7)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_any_integer_chooses(dtype: torch.dtype):
    weight, index = case(KINDS[1]), torch.tensor([[3, 10], [0, 3]])
    expected = embedding(index, *weight, torch.float32)
    for run in every_way((index.to(dtype), *weight, torch.float32)):
        assert torch.equal(run(index.to(dtype), *weight, torch.float32), expected)


def test_the_numbers_need_not_be_contiguous():
    weight, index = case(KINDS[0]), torch.randint(0, 11, (6, 8))
    for view in (index.T, index[::2, ::3], index[:, 1]):
        expected = embedding(view.contiguous(), *weight, torch.bfloat16)
        assert torch.equal(embedding(view, *weight, torch.bfloat16), expected)


@every_kind
def test_a_weight_that_is_not_contiguous_is_read_where_it_lies(kind: Kind):
    (weight,) = case(kind)
    wide = weight.map(lambda t: t.repeat_interleave(2, 0)[::2])
    index = torch.tensor([10, 0, 4])
    expected = embedding(index, weight, torch.float32)
    torch.testing.assert_close(embedding(index, wide, torch.float32), expected)
    # a native call would copy the whole weight first
    assert "do not lie in memory" in dict(embedding_op.explain(index, wide, torch.float32))["native"]


def test_blocks_of_rows_join_without_a_seam(monkeypatch):
    weight, index = case(KINDS[1]), torch.randint(0, 11, (50,))
    whole = embedding_op.kernels_for(*weight)[-1].run(index, *weight, torch.bfloat16)
    monkeypatch.setattr(blocks, "BLOCK_WEIGHT_BYTES", 1200)
    assert torch.equal(embedding_op.kernels_for(*weight)[-1].run(index, *weight, torch.bfloat16), whole)


@pytest.mark.parametrize("wrong", [-1, 11, 2**40, -(2**63)])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3)], ids=str)
def test_a_row_that_does_not_exist_is_an_error_before_memory_is_read(wrong: int, shape: tuple[int, ...], monkeypatch):
    ran: list[Any] = []
    monkeypatch.setattr(embedding_op, "kernels", [])
    monkeypatch.setattr(embedding_op, "reference", lambda *args: ran.append(args))
    index = torch.zeros(shape, dtype=torch.int64)
    index.view(-1)[-1] = wrong
    for op in (embedding, embedding_op, embedding_op.in_graph):
        with pytest.raises(IndexError, match=rf"row {wrong} does not exist: the weight has 11 of them, 0 to 10"):
            op(index, *case(KINDS[0]), torch.float32)
    assert not ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64], ids=str)
def test_what_is_no_integer_is_an_error(dtype: torch.dtype):
    with pytest.raises(ValueError, match=f"integers of 8 to 64 bits, but these have dtype {dtype}"):
        embedding(torch.zeros(3).to(dtype), *case(KINDS[0]), torch.float32)


def test_other_errors_are_those_of_dequantize():
    index, weight = torch.tensor([0]), case(KINDS[0])
    with pytest.raises(ValueError, match=r"cannot dequantize to torch\.int8"):
        embedding(index, *weight, torch.int8)
    with pytest.raises(ValueError, match="codes of 199 columns"):
        embedding(index, weight[0]._replace(in_features=199), torch.float32)
    with pytest.raises(ValueError, match="the row numbers are on meta, but the weight is on cpu"):
        embedding(index.to("meta"), *weight, torch.float32)


# ---------------------------------------------------------------------------------------------------- torch looks on


@every_kind
def test_vmap_over_rows_and_over_weights(kind: Kind):
    (weight,) = case(kind)
    packed, index = weight.packed, torch.randint(0, 11, (3, 4))
    expected = embedding(index, weight, torch.float32)
    made = torch.func.vmap(lambda i: embedding(i, weight, torch.float32))(index)
    assert torch.equal(made, expected)
    made = torch.func.vmap(lambda i: embedding(i, weight, torch.float32), in_dims=1)(index)
    assert torch.equal(made, expected.transpose(0, 1))
    made = torch.func.vmap(lambda p: embedding(index, weight._replace(packed=p), torch.float32))(
        torch.stack([packed, packed.flip(0)])
    )
    assert torch.equal(made[0], expected)
    assert torch.equal(made[1], embedding(index, weight._replace(packed=packed.flip(0)), torch.float32))


def test_gradients_and_tangents_pass_by():
    weight, index = case(KINDS[1]), torch.tensor([1, 5])
    rows = embedding(index, *weight, torch.float32)
    f = lambda x: (x * embedding(index, *weight, torch.float32)).sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(f)(torch.ones(200)), rows.sum(0))
    torch.testing.assert_close(torch.func.jvp(f, (torch.ones(200),), (torch.ones(200),))[1], rows.sum())


@every_kind
def test_a_compiled_graph_is_one_for_all_lengths(kind: Kind):
    weight, counter = case(kind), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda i: embedding(i, *weight, torch.bfloat16), fullgraph=True, dynamic=True, backend=counter
    )
    for length in (2, 7, 31):
        index = torch.randint(0, 11, (length,))
        assert torch.equal(compiled(index), embedding(index, *weight, torch.bfloat16))
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_follows_other_rows():
    weight, index = case(KINDS[1]), torch.tensor([1, 5])
    run = lambda i: embedding(i, *weight, torch.float32)  # noqa: E731
    for traced in (torch.jit.trace(run, (index,), check_trace=False), make_fx(run)(index)):
        assert torch.equal(traced(index + 3), run(index + 3))


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_fake_and_meta_tensors_have_the_shape_of_the_result(dtype: torch.dtype):
    index, (weight,) = torch.zeros(2, 3, dtype=torch.int32), case(KINDS[1])
    mode = FakeTensorMode()
    fake = [mode.from_tensor(index), weight.map(mode.from_tensor)]
    meta = [index.to("meta"), weight.map(lambda tensor: tensor.to("meta"))]
    with mode:
        inside = embedding(*fake, dtype)
    for made in (inside, embedding(*fake, dtype), embedding(*meta, dtype)):
        assert (tuple(made.shape), made.dtype) == ((2, 3, 200), dtype)
