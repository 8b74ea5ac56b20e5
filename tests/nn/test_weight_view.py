"""The weight that a frozen layer shows: a float tensor to read. What is written is stored exactly, or an error."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quanto_hf.flow import freeze, quantize
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
    "mul_ by 3": lambda w: w.mul_(3),
    "mul_ by 0": lambda w: w.mul_(0),
    "mul_ by -2": lambda w: w.mul_(-2),
    "rows": lambda w: w.mul_(torch.tensor([1.0, 2.0] * 12)[:, None]),
    "foreach": lambda w: torch._foreach_mul_([w], 3),
    "normal_": nn.init.normal_,
    "set_": lambda w: w.set_(torch.zeros(3)),
    "underflow": lambda w: w.mul_(2.0**-140),
    "overflow": lambda w: w.mul_(2.0**140),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_every_way_to_write_is_an_error_that_says_what_to_do(layer: QLinear, write) -> None:
    before = layer.dequantized()
    with pytest.raises(RuntimeError, match=r"cannot be written: it is held quantized.*dequantize the model first"):
        write(layer.weight)
    assert torch.equal(layer.dequantized(), before)


SCALED = {
    "mul_": lambda w: w.mul_(0.25),
    "div_": lambda w: w.div_(4),
    "data": lambda w: w.data.mul_(0.25),
    "data =": lambda w: setattr(w, "data", w * 0.25),
    "data *=": lambda w: exec("w.data *= 0.25", {"w": w}),
    "copy_": lambda w: w.copy_(w / 4),
    "out": lambda w: torch.mul(w, 0.25, out=w),
    "item": lambda w: w.__setitem__(slice(None), w / 4),
    "foreach": lambda w: torch._foreach_mul_([w], 0.25),
    "tensor": lambda w: w.div_(torch.tensor(4.0)),
}


@pytest.mark.parametrize("weights", ["int8", "int4", "int2", "float8", "nf4", "fp4", "aqlm-1x8"])
@pytest.mark.parametrize("write", SCALED.values(), ids=SCALED)
def test_a_power_of_two_is_written_into_the_scales_and_taken_back_to_the_same_bits(write, weights) -> None:
    layer = QLinear.from_module(nn.Linear(96, 24), make_scheme(weights))
    layer.freeze()
    before, state = layer.dequantized(), {name: t.clone() for name, t in layer.state_dict().items()}
    x = torch.randn(3, 96)
    wanted = layer(x) - layer.bias
    with torch.no_grad():
        write(layer.weight)
        assert torch.equal(layer.dequantized(), before / 4)
        # the call that was prepared for the former scales is not used
        torch.testing.assert_close(layer(x) - layer.bias, wanted / 4, rtol=1e-6, atol=1e-6)
        assert isinstance(layer.weight.mul_(4), WeightView)
    assert all(torch.equal(t, state[name]) for name, t in layer.state_dict().items())


def test_what_leaves_the_weight_as_it_is_may_be_written(layer: QLinear) -> None:
    # Gemma3n clips weights that are within the limits already
    before = layer.dequantized()
    layer.weight.data.clamp_(-120, 120)
    layer.weight.copy_(before)
    layer.weight.data = before
    assert torch.equal(layer.dequantized(), before)


def test_a_scaled_layer_leaves_the_former_tensors_alone(layer: QLinear) -> None:
    state = layer.state_dict()
    copies = {name: tensor.clone() for name, tensor in state.items()}
    layer.weight.mul_(2)
    assert all(torch.equal(tensor, copies[name]) for name, tensor in state.items())


def test_scaling_works_in_inference_mode(layer: QLinear) -> None:
    before = layer.dequantized()
    with torch.inference_mode():
        layer.weight.mul_(2)
    assert torch.equal(layer.dequantized(), 2 * before)
    layer.weight.mul_(0.5)
    assert torch.equal(layer.dequantized(), before) and not layer.weight_scale.is_inference()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scaled_where_numbers_lose_bits(dtype: torch.dtype) -> None:
    layer = QLinear.from_module(nn.Linear(96, 24, dtype=dtype), make_scheme("int8"))
    layer.freeze()
    scale = layer.weight_scale.clone()
    for factor in (2.0**-11, 2.0**11):
        layer.weight.mul_(factor)
    assert torch.equal(layer.weight_scale, scale)


def test_the_error_says_which_layer_and_which_operation() -> None:
    net = nn.Sequential(nn.ReLU(), nn.Linear(8, 8))
    freeze(quantize(net, "int8"))
    with pytest.raises(RuntimeError, match=r"^1: add_ writes, but the weight of a frozen QLinear.*convert=\['1'\]"):
        net[1].weight.add_(1)
    with pytest.raises(RuntimeError, match=r"^1: weight\[\.\.\.\] = \.\.\. writes"):
        net[1].weight[0] = 1
    with pytest.raises(RuntimeError, match=r"^1: weight = nn.Parameter\(\.\.\.\) writes"):
        net[1].weight = nn.Parameter(torch.zeros(8, 8))


def test_a_weight_on_meta_is_not_scaled_without_a_word(layer: QLinear) -> None:
    # offloaded: nobody would ever see it
    with pytest.raises(RuntimeError, match="cannot be written"):
        layer.to("meta").weight.mul_(2)


def test_it_takes_part_in_a_gradient_like_a_constant(layer: QLinear) -> None:
    x = torch.randn(3, 96, requires_grad=True)
    F.linear(x, layer.weight).sum().backward()
    assert torch.allclose(x.grad, layer.dequantized().sum(0).expand(3, -1))


def test_a_compiled_graph_reads_it_without_a_break(layer: QLinear) -> None:
    compiled = torch.compile(lambda m, x: F.linear(x, m.weight), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 96)
    assert torch.allclose(compiled(layer, x), F.linear(x, layer.weight), atol=1e-6)
