"""Quantized embeddings: the rows of the weight that they show."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_weights import needs_native
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from quanto_hf import Calibration
from quanto_hf.nn import QEmbedding, QEmbeddingBag
from quanto_hf.qtypes import QTYPES, qint8
from quanto_hf.schemes import make_scheme

every_weight = pytest.mark.parametrize("weights", QTYPES)
ROWS, WIDTH = 20, 40
INDEX = torch.tensor([[3, 0, 19], [3, 7, 0]])


def both(cls, source: nn.Module, weights: str):
    """A PREPARED module, and the FROZEN one."""
    layer = cls.from_module(source, make_scheme(weights))
    packed = copy.deepcopy(layer)
    packed.freeze()
    return layer, packed


@every_weight
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("padding", [None, 0, -1])
def test_an_embedding_gives_rows_of_its_weight_in_every_state(weights, dtype, padding):
    layer, packed = both(QEmbedding, nn.Embedding(ROWS, WIDTH, padding, dtype=dtype), weights)
    wanted = packed.to_float()(INDEX)
    assert wanted.dtype == dtype and isinstance(packed, nn.Embedding)
    assert torch.equal(packed(INDEX), wanted) and torch.equal(layer(INDEX), wanted)
    for shape in ((), (0,), (2, 0, 3)):
        index = torch.zeros(shape, dtype=torch.long)
        assert packed(index).shape == layer(index).shape == (*shape, WIDTH)


@pytest.mark.parametrize("scale_grad_by_freq", [False, True])
def test_gradients_of_a_prepared_embedding_are_those_of_a_float_one(scale_grad_by_freq):
    source = nn.Embedding(ROWS, WIDTH, padding_idx=3, scale_grad_by_freq=scale_grad_by_freq)
    layer, grad = QEmbedding.from_module(source, make_scheme("int4")), torch.randn(2, 3, WIDTH)
    plain = copy.deepcopy(source)
    plain(INDEX).backward(grad)
    layer(INDEX).backward(grad)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    assert not layer.weight.grad[3].any()


@every_weight
def test_a_row_that_does_not_exist_is_an_error(weights):
    _, packed = both(QEmbedding, nn.Embedding(ROWS, WIDTH), weights)
    with pytest.raises(IndexError, match="20"):
        packed(torch.tensor([1, ROWS]))


@given(
    weights=st.sampled_from(["int8", "int4", "nf4"]),
    mode=st.sampled_from(["sum", "mean", "max"]),
    padding=st.sampled_from([None, 3, -1]),
    last=st.booleans(),
    bags=st.lists(st.lists(st.integers(0, ROWS - 1), max_size=4), min_size=1, max_size=5),
)
@settings(max_examples=80, deadline=None)
def test_bags_of_every_kind_are_those_of_the_weight(weights, mode, padding, last, bags):
    source = nn.EmbeddingBag(ROWS, WIDTH, mode=mode, padding_idx=padding, include_last_offset=last)
    layer, packed = both(QEmbeddingBag, source, weights)
    index = torch.tensor([row for bag in bags for row in bag], dtype=torch.long)
    ends = [sum(map(len, bags[:i])) for i in range(len(bags) + 1)]
    offsets = torch.tensor(ends if last else ends[:-1])
    wanted = packed.to_float()(index, offsets)
    assert torch.equal(packed(index, offsets), wanted) and torch.equal(layer(index, offsets), wanted)
    if mode == "sum":
        per_sample = torch.randn(len(index))
        wanted = packed.to_float()(index, offsets, per_sample)
        torch.testing.assert_close(packed(index, offsets, per_sample), wanted)
        torch.testing.assert_close(layer(index, offsets, per_sample), wanted)


@pytest.mark.parametrize("padding", [None, 3])
def test_bags_of_a_matrix_and_their_gradients(padding):
    source = nn.EmbeddingBag(ROWS, WIDTH, padding_idx=padding)
    layer, packed = both(QEmbeddingBag, source, "int4")
    plain, grad = packed.to_float(), torch.randn(2, WIDTH)
    made, wanted = layer(INDEX), plain(INDEX)
    assert torch.equal(made, wanted) and torch.equal(packed(INDEX), wanted)
    made.backward(grad)
    wanted.backward(grad)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("cls, source", [(QEmbedding, nn.Embedding), (QEmbeddingBag, nn.EmbeddingBag)])
def test_one_that_writes_its_weight_when_it_is_read_is_refused(cls, source):
    with pytest.raises(ValueError, match=r"renormalises the rows that it reads .*set max_norm=None, or leave it float"):
        cls.from_module(source(ROWS, WIDTH, max_norm=1.0), make_scheme("int8"))


def test_its_inputs_are_numbers_of_rows_and_never_rounded_or_calibrated():
    layer = QEmbedding.from_module(nn.Embedding(ROWS, WIDTH), make_scheme("int8"), qint8, static=True)
    assert layer.activations is None and not layer.is_static
    with pytest.raises(ValueError, match="no layer of this model rounds its input"):
        Calibration(layer)


def test_a_cast_changes_what_is_read_and_not_what_is_stored():
    _, packed = both(QEmbedding, nn.Embedding(ROWS, WIDTH), "int4")
    stored = packed.weight_packed.clone()
    assert packed.bfloat16()(INDEX).dtype == torch.bfloat16 and torch.equal(packed.weight_packed, stored)


def test_one_graph_under_torch_compile():
    torch._dynamo.reset()
    _, packed = both(QEmbedding, nn.Embedding(ROWS, WIDTH), "int4")
    assert torch.equal(torch.compile(packed, fullgraph=True, backend="aot_eager")(INDEX), packed(INDEX))


# ---------------------------------------------------------------------------------------------------- prepared calls


def frozen(weights: str = "int4", seed: int = 0) -> QEmbedding:
    torch.manual_seed(seed)
    return both(QEmbedding, nn.Embedding(ROWS, WIDTH), weights)[1]


def served(layer: QEmbedding) -> bool:
    """Whether the prepared call answers."""
    return layer.bound_call()(INDEX, layer.weight_dtype) is not None


@needs_native
@every_weight
def test_the_call_is_prepared_once(weights, monkeypatch):
    layer, made = frozen(weights), []
    right = type(layer.scheme).bind_rows
    monkeypatch.setattr(type(layer.scheme), "bind_rows", lambda *args: made.append(args) or right(*args))
    for _ in range(3):
        assert torch.equal(layer(INDEX), layer.dequantized()[INDEX])
    assert len(made) == 1 and served(layer)


@needs_native
def test_numbers_of_another_type_are_rows_too():
    layer = frozen()
    expected = layer(INDEX)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(layer(INDEX.to(dtype)), expected)
    assert torch.equal(layer(INDEX.T), expected.transpose(0, 1))


@needs_native
@pytest.mark.parametrize("way", ["data", "set_tensors", "state dict", "assigned state dict"])
def test_another_weight_is_followed(way):
    layer, other = frozen(), frozen(seed=1)
    assert not torch.equal(layer(INDEX), other(INDEX))
    tensors = {name: tensor.data.clone() for name, tensor in other.tensors().items()}
    if way == "data":
        for name, tensor in layer.tensors().items():
            tensor.data = tensors[name]
    elif way == "set_tensors":
        layer.set_tensors(tensors)
    else:
        layer.load_state_dict({f"weight_{name}": t for name, t in tensors.items()}, assign="assigned" in way)
    assert torch.equal(layer(INDEX), other(INDEX))
    assert served(layer) is (way != "data")


def test_a_weight_of_another_size_is_an_error_not_a_read_behind_its_end():
    for name in ("weight_packed", "weight_scale", "weight_zero"):
        layer = frozen()
        layer(INDEX)
        tensor = getattr(layer, name)
        tensor.data = tensor.data[:-1]
        with pytest.raises((ValueError, IndexError)):
            layer(INDEX)


@needs_native
def test_a_layer_in_another_dtype_gives_rows_in_that():
    layer = frozen()
    layer(INDEX)
    layer.bfloat16()
    made = layer(INDEX)
    assert made.dtype is torch.bfloat16 and torch.equal(made, layer.dequantized()[INDEX]) and served(layer)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_a_copy_has_a_call_of_its_own(way):
    layer = frozen()
    expected = layer(INDEX)
    other = way(layer)
    for tensor in layer.tensors().values():
        tensor.data.zero_()
    assert torch.equal(other(INDEX), expected)


def test_torch_may_look_on():
    torch._dynamo.reset()
    layer = frozen()
    expected = layer(INDEX)
    assert torch.equal(torch.func.vmap(layer)(INDEX), expected)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(INDEX), expected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(INDEX).shape == expected.shape
    assert torch.equal(layer(INDEX), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=["cast-bf16", "cast-fp16"])
def test_bags_with_padding_run_under_autocast_for_the_other_half(dtype, cast):
    _, packed = both(QEmbeddingBag, nn.EmbeddingBag(ROWS, WIDTH, padding_idx=3, dtype=dtype), "int8")
    with torch.autocast("cpu", dtype=cast):
        assert torch.equal(packed(INDEX), packed.to_float()(INDEX))


@pytest.mark.parametrize("weights", ["int4", "aqlm-1x4"])
def test_row_numbers_that_are_no_integers_are_refused(weights):
    _, packed = both(QEmbedding, nn.Embedding(ROWS, WIDTH), weights)
    for index in (INDEX.float() + 0.7, INDEX > 3):
        with pytest.raises(ValueError, match="rows are chosen by integers"):
            packed(index)
