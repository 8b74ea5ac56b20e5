"""The prepared call of an embedding gives the bits of the op, and steps aside for everything else."""

from typing import Any

import pytest
import torch
from native_weights import Kind, Weight, every_float, make_weight, needs_native
from torch._subclasses.fake_tensor import FakeTensorMode

from quanto_hf.ops import embedding, embedding_op

pytestmark = needs_native

KINDS = [Kind("int8", -1), Kind("int4", 64, True), Kind("int2", 96), Kind("float8_e5m2", -1), Kind("nf4", 32)]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
ROWS, K = 11, 200


@pytest.fixture
def weight() -> Weight:
    return make_weight(Kind("int4", 64, True), ROWS, K)


@every_kind
@every_float
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (600,)], ids=str)
def test_it_gives_the_bits_of_the_op(kind: Kind, dtype: torch.dtype, shape: tuple[int, ...]):
    args, index = make_weight(kind, ROWS, K).rest(), torch.randint(0, ROWS, shape)
    made = embedding_op.bind(*args)(index, dtype)
    assert made.shape == (*shape, K) and torch.equal(made, embedding(index, *args, dtype))


INDEX = torch.tensor([3, 0, 10])
ASIDE = {
    "int32": INDEX.int(),
    "floats": INDEX.float(),
    "strided": torch.stack([INDEX, INDEX], 1)[:, 0],
    "negative-bit": torch._neg_view(-INDEX),
    "subclass": INDEX.as_subclass(type("Tagged", (torch.Tensor,), {})),
    "meta": INDEX.to("meta"),
    "none": INDEX[:0],
    "below": torch.tensor([3, -1]),
    "above": torch.tensor([3, ROWS]),
    "far": torch.tensor([2**62]),
}


@pytest.mark.parametrize("index", ASIDE.values(), ids=ASIDE)
def test_it_steps_aside_for_another_index(weight: Weight, index: torch.Tensor):
    call = embedding_op.bind(*weight.rest())
    assert call(INDEX, torch.float32) is not None and call(index, torch.float32) is None


def test_an_index_may_lie_at_any_address(weight: Weight):
    odd = torch.frombuffer(bytearray(b"-" + INDEX.numpy().tobytes()), dtype=torch.int64, offset=1)
    assert odd.data_ptr() % 8
    made = embedding_op.bind(*weight.rest())(odd, torch.float32)
    assert torch.equal(made, embedding(INDEX, *weight.rest(), torch.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8], ids=str)
def test_it_steps_aside_for_another_dtype(weight: Weight, dtype: torch.dtype):
    assert embedding_op.bind(*weight.rest())(INDEX, dtype) is None


MOVES = {
    "elsewhere": lambda t: t.clone(),
    "shorter": lambda t: t[:-1],
    "another-shape": lambda t: t.view(-1),
    "another-dtype": lambda t: t.view(torch.int8 if t.dtype is torch.uint8 else torch.float16),
    "strided": lambda t: t.as_strided(t.shape, (0, 1)),
    "let-go": lambda t: t.new_empty(0),
}


@pytest.mark.parametrize("name", ["packed", "scale", "zero"])
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_it_steps_aside_once_the_weight_is_other_memory(weight: Weight, name: str, move: Any):
    call = embedding_op.bind(*weight.rest())
    assert call(INDEX, torch.float32) is not None
    tensor = getattr(weight, name)
    kept = tensor.data
    tensor.data = move(tensor.data)
    assert call(INDEX, torch.float32) is None
    tensor.data = kept
    assert call(INDEX, torch.float32) is not None


def test_it_steps_aside_where_torch_looks_on(weight: Weight):
    call = embedding_op.bind(*weight.rest())
    call(INDEX, torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert call(INDEX, torch.float32) is None

    def seen(index: torch.Tensor) -> torch.Tensor:
        assert call(index, torch.float32) is None
        return index

    torch.func.vmap(seen)(INDEX[None])
    assert call(INDEX, torch.float32) is not None


def test_there_is_none_for_a_weight_that_is_not_plain_memory_and_for_the_reference(weight: Weight, monkeypatch):
    (value,) = weight.rest()
    assert embedding_op.bind(value.rows(slice(0, 0))) is None
    assert embedding_op.bind(value.rows(slice(0, None, 2))) is None
    assert embedding_op.bind(value.map(lambda t: t.to("meta"))) is None
    with pytest.raises(ValueError, match="scale"):
        embedding_op.bind(value._replace(scale=value.scale[1:]))
    monkeypatch.setenv("QUANTO_HF_REFERENCE", "1")
    assert embedding_op.bind(value) is None
