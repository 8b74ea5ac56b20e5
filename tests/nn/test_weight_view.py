"""The weight that a frozen layer shows: a float tensor to read, an error to write."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quanto_hf.nn import QLinear
from quanto_hf.nn.weight_view import WeightView
from quanto_hf.schemes import make_scheme


@pytest.fixture
def layer() -> QLinear:
    made = QLinear.from_module(nn.Linear(96, 24), make_scheme("int4"))
    made.freeze()
    return made


def test_shape_dtype_and_device_are_known_without_dequantizing(layer: QLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QLinear, "dequantized", lambda self: pytest.fail("dequantized"))
    weight = layer.weight
    assert isinstance(weight, WeightView) and isinstance(weight, torch.Tensor)
    assert (weight.shape, weight.dtype, weight.device.type, weight.numel()) == ((24, 96), torch.float32, "cpu", 24 * 96)
    assert not weight.requires_grad and weight.dim() == 2


READS = {
    "detach": lambda w: w.detach(),
    "clone": lambda w: w.clone(),
    "to": lambda w: w.to(torch.float64).float(),
    "index": lambda w: torch.stack([w[i] for i in range(w.shape[0])]),
    "numpy": lambda w: torch.from_numpy(w.numpy()),
    "list": lambda w: torch.tensor(w.tolist()),
    "deepcopy": copy.deepcopy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "matmul": lambda w: torch.eye(24) @ w,
    "transpose": lambda w: w.t().t(),
    "data": lambda w: w.data + 0,
    "out": lambda w: torch.add(w, 0, out=torch.empty(24, 96)),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_every_way_to_read_gives_a_plain_tensor_with_the_dequantized_values(layer: QLinear, read) -> None:
    result = read(layer.weight)
    assert type(result) is torch.Tensor
    assert torch.equal(result, layer.dequantized())


def test_a_saved_view_is_a_plain_tensor(layer: QLinear) -> None:
    file = io.BytesIO()
    torch.save({"weight": layer.weight}, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["weight"], layer.dequantized())


def _item(w: torch.Tensor) -> None:
    w[0] = 0


def _data(w: torch.Tensor) -> None:
    w.data = torch.zeros(24, 96)


def _add_to_data(w: torch.Tensor) -> None:
    w.data += 1


WRITES = {
    "add_": lambda w: w.add_(1),
    "copy_": lambda w: w.copy_(torch.zeros(24, 96)),
    "init": nn.init.zeros_,
    "out": lambda w: torch.add(torch.ones(24, 96), 1, out=w),
    "item": _item,
    "data": _data,
    "data +=": _add_to_data,
    "data.copy_": lambda w: w.data.copy_(torch.zeros(24, 96)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_every_way_to_write_is_an_error_that_says_what_to_do(layer: QLinear, write) -> None:
    before = layer.dequantized()
    with pytest.raises(RuntimeError, match=r"cannot be written: it is held quantized.*dequantize the model first"):
        write(layer.weight)
    assert torch.equal(layer.dequantized(), before)


def test_it_takes_part_in_a_gradient_like_a_constant(layer: QLinear) -> None:
    x = torch.randn(3, 96, requires_grad=True)
    F.linear(x, layer.weight).sum().backward()
    assert torch.allclose(x.grad, layer.dequantized().sum(0).expand(3, -1))


def test_a_compiled_graph_reads_it_without_a_break(layer: QLinear) -> None:
    compiled = torch.compile(lambda m, x: F.linear(x, m.weight), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 96)
    assert torch.allclose(compiled(layer, x), F.linear(x, layer.weight), atol=1e-6)
