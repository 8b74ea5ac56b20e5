"""A layer's prepared call gives what the op gives, and steps aside for everything else: never a wrong number."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from native_weights import Kind, Weight, every_float, make_weight, needs_native
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from quanto_hf.nn import QLinear
from quanto_hf.ops import linear, linear_op
from quanto_hf.ops.cpu import call
from quanto_hf.ops.registry import why_kernel_wrong
from quanto_hf.schemes import make_scheme

pytestmark = needs_native

K, N = 200, 17
KINDS = [Kind("int8", -1), Kind("int4", 64, True), Kind("int2", 96), Kind("float8_e4m3fn", -1), Kind("nf4", 32)]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
WEIGHTS = ["int8", "int4", "int2", "float8", "nf4"]
every_weight = pytest.mark.parametrize("weights", WEIGHTS)


def make_layer(weights: str = "int4", dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> QLinear:
    layer = QLinear.from_module(nn.Linear(K, N, bias, dtype=dtype), make_scheme(weights))
    layer.freeze()
    return layer.requires_grad_(False)


def make_x(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*(shape or (3, K))).to(dtype)


def general(layer: QLinear, x: torch.Tensor) -> torch.Tensor:
    """What the layer gives without its prepared call."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return layer.scheme.linear(x, layer.tensors(), bias)


def served(layer: QLinear, x: torch.Tensor) -> bool:
    """Whether the prepared call answers."""
    return layer._fast_forward(x) is not None


def check_close(made: torch.Tensor, layer: QLinear, x: torch.Tensor) -> None:
    """``made`` is the product with the dequantized weight, to three roundings of the dtype of x."""
    weight, bias = layer.dequantized().double(), layer.bias.double()
    exact, terms = F.linear(x.double(), weight, bias), F.linear(x.double().abs(), weight.abs(), bias.abs())
    assert made.shape == exact.shape
    eps = torch.finfo(min(x.dtype, layer.weight_dtype, key=lambda dtype: dtype.itemsize)).eps
    assert ((made.double() - exact).abs() <= 3 * eps * terms + 1e-30).all()


# ---------------------------------------------------------------------------------------------------- it serves


@every_kind
@every_float
def test_the_prepared_call_gives_what_the_op_gives(level: str, kind: Kind, dtype: torch.dtype):
    weight, bias = make_weight(kind, N, K), torch.randn(N).to(dtype)
    run = linear_op.bind(*weight.rest())
    for lead in [(), (1,), (8,), (9,), (2, 3), (2, 1, 9), (70,)]:
        x = make_x(*lead, K, dtype=dtype)
        for b in (bias, None):
            made = run(x, b)
            assert made.shape == (*lead, N) and made.dtype == dtype
            assert torch.equal(made, linear(*weight.linear(x, b)))


@every_weight
@pytest.mark.parametrize("lead", [(), (1,), (4,), (2, 9)], ids=str)
def test_a_frozen_layer_is_served(level: str, weights: str, lead: tuple[int, ...]):
    layer, x = make_layer(weights), make_x(*lead, K)
    assert served(layer, x)
    assert torch.equal(layer(x), general(layer, x))


def test_a_float_layer_is_not():
    layer = QLinear.from_module(nn.Linear(K, N), make_scheme("int4"))
    assert not served(layer, make_x(dtype=torch.float32))


def test_a_weight_without_rows_is_not():
    layer = QLinear(K, 0, scheme=make_scheme("int4"), dtype=torch.bfloat16)
    assert not served(layer, make_x())
    assert layer(make_x()).shape == (3, 0)


def test_the_prepared_call_follows_its_weight_in_place():
    layer, x = make_layer(), make_x()
    before = layer(x)
    with torch.no_grad():
        layer.weight_scale.mul_(2)
        layer.bias.mul_(2)
    assert served(layer, x)
    assert torch.equal(layer(x), 2 * before)


# ---------------------------------------------------------------------------------------------------- inputs


INPUTS: dict[str, Callable[[], torch.Tensor]] = {
    "requires a gradient": lambda: make_x().requires_grad_(),
    "transposed": lambda: make_x(K, 3).T,
    "every other row": lambda: make_x(6, K)[::2],
    "every other column": lambda: make_x(3, 2 * K)[:, ::2],
    "expanded": lambda: make_x(1, K).expand(3, K),
    "no rows": lambda: make_x(0, K),
    "no rows in the middle": lambda: make_x(2, 0, K),
    "another dtype than the bias": lambda: make_x(dtype=torch.float32),
    "negative bit": lambda: torch.complex(*torch.randn(2, 3, K)).conj().imag,
    "a subclass": lambda: make_x().as_subclass(type("Tagged", (torch.Tensor,), {})),
}


@every_weight
@pytest.mark.parametrize("name", INPUTS)
def test_an_input_that_it_is_not_made_for_takes_the_general_way(weights: str, name: str):
    layer, x = make_layer(weights), INPUTS[name]()
    assert served(layer, make_x())
    assert not served(layer, x)
    check_close(layer(x), layer, x)


def test_gradients_flow_to_input_and_bias():
    layer, x = make_layer(), make_x().requires_grad_()
    layer.bias.requires_grad_()
    assert not served(layer, x.detach())
    layer(x).float().sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantized().sum(0).expand(3, K), rtol=2**-6, atol=2**-6)
    assert torch.equal(layer.bias.grad, torch.full((N,), 3.0, dtype=torch.bfloat16))
    with torch.no_grad():
        assert served(layer, x)


@every_weight
@pytest.mark.parametrize("width", [K - 1, K + 1, K - 100, 1, 0])
def test_an_input_of_another_width_is_an_error_with_both_shapes(weights: str, width: int):
    # 199 codes of 4 bits take as many bytes as 200: only the layer knows
    layer = make_layer(weights)
    for x in (make_x(3, width), make_x(3, width).requires_grad_(), make_x(width)):
        assert not served(layer, x)
        with pytest.raises(ValueError) as caught:
            layer(x)
        assert str(K) in str(caught.value) and str(tuple(x.shape)) in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64, torch.bool], ids=str)
def test_an_input_of_another_kind_of_number_is_an_error(dtype: torch.dtype):
    layer = make_layer(bias=False)
    x = torch.ones(3, K).to(dtype)
    assert not served(layer, x)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        layer(x)


def test_an_input_without_dimensions_is_an_error():
    layer = make_layer()
    assert not served(layer, torch.tensor(1.0, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=rf"{K}"):
        layer(torch.tensor(1.0, dtype=torch.bfloat16))


# ---------------------------------------------------------------------------------------------------- the weight moves


@every_weight
def test_other_data_behind_the_same_parameter_is_seen(weights: str):
    layer, other, x = make_layer(weights), make_layer(weights), make_x()
    layer(x)
    for name in layer.tensors():
        getattr(layer, f"weight_{name}").data = getattr(other, f"weight_{name}").data.clone()
        assert not served(layer, x)
    assert not torch.equal(layer(x), other(x))
    layer.bias.data = other.bias.data.clone()
    assert torch.equal(layer(x), other(x))


def test_data_of_another_size_is_an_error_not_a_read_behind_its_end():
    layer, x = make_layer(), make_x()
    layer(x)
    layer.weight_packed.data = layer.weight_packed.data[:, :-4].contiguous()
    assert not served(layer, x)
    with pytest.raises(ValueError, match=r"shape \(17, 96\)"):
        layer(x)


def test_a_shorter_view_of_the_same_memory_is_an_error_too():
    for name in ("weight_packed", "weight_scale", "weight_zero"):
        layer, x = make_layer(), make_x()
        layer(x)
        tensor = getattr(layer, name)
        tensor.data = tensor.data[:-1]
        assert not served(layer, x)
        with pytest.raises(ValueError):
            layer(x)


def test_data_moved_back_is_served_again():
    # what offload does to each layer of each token
    layer, x = make_layer(), make_x()
    expected = layer(x)
    kept = {name: tensor.data for name, tensor in layer.tensors().items()}
    for name, tensor in layer.tensors().items():
        tensor.data = torch.zeros_like(tensor)
        tensor.data = kept[name]
    assert served(layer, x)
    assert torch.equal(layer(x), expected)


@every_weight
def test_replaced_parameters_are_bound_anew(weights: str):
    layer, other, x = make_layer(weights), make_layer(weights), make_x()
    layer(x)
    layer.set_tensors({name: tensor.data.clone() for name, tensor in other.tensors().items()})
    layer.bias = nn.Parameter(other.bias.data.clone(), requires_grad=False)
    assert served(layer, x)
    assert torch.equal(layer(x), other(x))


def test_a_state_dict_is_followed(tmp_path):
    layer, other, x = make_layer(), make_layer(), make_x()
    layer(x)
    for assign in (False, True):
        layer.load_state_dict({name: tensor.clone() for name, tensor in other.state_dict().items()}, assign=assign)
        layer.requires_grad_(False)
        assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_layer_in_another_dtype_is_served_in_that(dtype: torch.dtype):
    layer, x = make_layer(), make_x()
    layer(x)
    scale = layer.weight_scale.dtype
    layer.to(dtype)
    assert layer.weight_scale.dtype is scale and layer.bias.dtype is dtype
    assert served(layer, x.to(dtype))
    check_close(layer(x.to(dtype)), layer, x.to(dtype))
    assert not served(layer, x)
    check_close(layer(x), layer, x)


def test_a_layer_that_takes_another_number_type_is_bound_anew():
    layer, other, x = make_layer("int8"), make_layer("int4"), make_x()
    layer(x)
    layer.load_state_dict(layer.state_dict())
    layer.scheme, layer._parameters = other.scheme, other._parameters
    assert torch.equal(layer(x), other(x))


def copied(layer: QLinear) -> QLinear:
    return copy.deepcopy(layer)


def pickled(layer: QLinear) -> QLinear:
    return pickle.loads(pickle.dumps(layer))


def saved(layer: QLinear) -> QLinear:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@every_weight
@pytest.mark.parametrize("way", [copied, pickled, saved], ids=lambda way: way.__name__)
def test_a_copy_has_a_call_of_its_own(weights: str, way: Callable[[QLinear], QLinear]):
    layer, x = make_layer(weights), make_x()
    expected = layer(x)
    other = way(layer)
    assert other._bound is None
    for tensor in layer.tensors().values():
        tensor.data.zero_()
    del layer
    assert served(other, x)
    assert torch.equal(other(x), expected)


def test_weights_and_biases_on_the_meta_device():
    layer, x = make_layer(), make_x()
    layer(x)
    with pytest.raises(ValueError, match="the input is on meta, but the weight is on cpu"):
        layer(x.to("meta"))
    layer.bias = nn.Parameter(layer.bias.to("meta"), requires_grad=False)
    assert not served(layer, x)
    with pytest.raises(ValueError, match="the bias is on meta, but the weight is on cpu"):
        layer(x)
    layer.to("meta")
    assert not served(layer, x.to("meta"))
    assert layer(x.to("meta")).is_meta
    with pytest.raises(ValueError, match="the input is on cpu, but the weight is on meta"):
        layer(x)


# ---------------------------------------------------------------------------------------------------- torch looks on


@every_weight
def test_vmap_over_a_layer(weights: str):
    layer, x = make_layer(weights), make_x(4, 3, K)
    expected = layer(x)
    made = torch.func.vmap(layer)(x)
    torch.testing.assert_close(made, expected, rtol=2**-6, atol=2**-5)
    assert torch.equal(layer(x), expected)


@every_weight
def test_gradients_and_tangents_of_torch_func(weights: str):
    layer, x, direction = make_layer(weights, torch.float32), make_x(dtype=torch.float32), torch.randn(3, K)
    weight = layer.dequantized()
    gradient = torch.func.grad(lambda x: layer(x).sum())(x)
    torch.testing.assert_close(gradient, weight.sum(0).expand(3, K), rtol=1e-4, atol=1e-4)
    out, tangent = torch.func.jvp(layer, (x,), (direction,))
    torch.testing.assert_close(out, layer(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tangent, direction @ weight.T, rtol=1e-4, atol=1e-4)


def test_forward_gradients_are_not_lost():
    layer, x, direction = make_layer("int4", torch.float32), make_x(dtype=torch.float32), torch.randn(3, K)
    layer(x)
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, direction)))
    torch.testing.assert_close(out.tangent, direction @ layer.dequantized().T, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_holds_the_product():
    layer, x, other = make_layer(), make_x(), make_x()
    layer(x)
    for traced in (torch.jit.trace(layer, (x,), check_trace=False), make_fx(layer)(x)):
        check_close(traced(other), layer, other)


@pytest.mark.parametrize("enabled", [True, False], ids=["autocast", "autocast-off"])
def test_autocast(enabled: bool):
    layer, x = make_layer("int4", torch.float32), make_x(dtype=torch.float32)
    layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        assert served(layer, x) is not enabled
        made = layer(x)
    # as if input and layer were of the other dtype
    dtype = torch.bfloat16 if enabled else torch.float32
    assert torch.equal(made, layer.to(dtype)(x.to(dtype)))


def test_inference_mode():
    layer, x = make_layer(), make_x()
    with torch.inference_mode():
        inside = make_x()
        made = layer(inside)
        assert served(layer, inside) and made.is_inference()
        expected = layer(x)
    # what was prepared inside serves outside, and gradients too
    assert served(layer, x) and torch.equal(layer(x), expected)
    wanted = x.clone().requires_grad_()
    layer(wanted).sum().backward()
    assert wanted.grad is not None


@every_weight
def test_torch_compile_makes_one_graph_more_at_most_for_all_batch_sizes(weights: str):
    torch._dynamo.reset()
    layer, counter = make_layer(weights), CompileCounterWithBackend("aot_eager")
    layer(make_x())
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for rows in (5, 2, 9, 33, 128, 7, 1, 64):
        x = make_x(rows, K)
        with torch.no_grad():
            check_close(compiled(x), layer, x)
    # one row may be a case of its own
    assert counter.frame_count <= 2


def test_fake_tensors_have_a_shape_and_no_memory():
    layer, x = make_layer(), make_x()
    expected = layer(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for given in (x, mode.from_tensor(x)):
            made = layer(given)
            assert isinstance(made, FakeTensor) and made.shape == (3, N) and made.dtype == x.dtype
        assert layer.weight.shape == (N, K)
    # nothing fake is left behind
    made = layer(x)
    assert type(made) is torch.Tensor and torch.equal(made, expected)
    assert type(layer.dequantized()) is torch.Tensor
    assert type(general(layer, x.float())) is torch.Tensor


def test_a_layer_made_of_fake_tensors():
    with FakeTensorMode():
        layer = QLinear(K, N, scheme=make_scheme("int4"), dtype=torch.bfloat16)
        made = layer(torch.empty(3, K, dtype=torch.bfloat16))
    assert isinstance(made, FakeTensor) and made.shape == (3, N)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_default_device_does_not_matter(device: str):
    layer, x = make_layer(), make_x()
    call.value_table.cache_clear()
    why_kernel_wrong.cache_clear()
    with torch.device(device):
        made = layer(x)
        assert served(layer, x)
    assert made.device.type == "cpu"
    check_close(made, layer, x)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@every_weight
def test_the_default_dtype_does_not_matter(weights: str, default: torch.dtype, recwarn):
    # transformers sets it while a model is made
    layer, x = make_layer(weights), make_x()
    expected = layer(x)
    layer = copied(layer)
    call.value_table.cache_clear()
    why_kernel_wrong.cache_clear()
    torch.set_default_dtype(default)
    try:
        made = layer(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(made, expected)
    assert not [warning for warning in recwarn if warning.category is RuntimeWarning]


def test_the_self_check_does_not_mind_autocast(recwarn):
    weight, x = make_weight(Kind("int4", 64, True), N, K), make_x(dtype=torch.float32)
    why_kernel_wrong.cache_clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run = linear_op.bind(*weight.rest())
        assert run(x, None) is not None
    assert not [warning for warning in recwarn if warning.category is RuntimeWarning]


# ---------------------------------------------------------------------------------------------------- what is bound


def spoiled(weight: Weight) -> dict[str, Any]:
    (value,) = weight.rest()
    packed, scale, zero = value.stored
    return {
        "packed one row short": value._replace(packed=packed[1:]),
        "packed of another width": value._replace(packed=packed[:, 1:]),
        "packed of another dtype": value._replace(packed=packed.to(torch.int8)),
        "scale transposed": value._replace(scale=scale.T),
        "scale in float64": value._replace(scale=scale.double()),
        "scale on another device": value._replace(scale=scale.to("meta")),
        "zero one row short": value._replace(zero=zero[1:]),
        "zero of another dtype": value._replace(zero=zero.float()),
        "a number type that is none": value._replace(qtype="int3"),
    }


def test_tensors_that_do_not_fit_are_not_bound():
    for case, value in spoiled(make_weight(Kind("int4", 64, True), N, K)).items():
        with pytest.raises(ValueError):
            linear_op.bind(value)
            pytest.fail(f"no error for {case}")


def test_weights_that_are_not_plain_memory_have_no_prepared_call(monkeypatch):
    (value,) = make_weight(Kind("int4", 64, True), N, K).rest()
    assert linear_op.bind(value) is not None
    assert linear_op.bind(value._replace(packed=value.packed.T.contiguous().T)) is None
    assert linear_op.bind(value._replace(scale=value.scale.T.contiguous().T)) is None
    assert linear_op.bind(value._replace(zero=value.zero.as_subclass(type("Tagged", (torch.Tensor,), {})))) is None
    assert linear_op.bind(value.map(lambda tensor: tensor.to("meta"))) is None
    monkeypatch.setenv("QUANTO_HF_REFERENCE", "1")
    assert linear_op.bind(value) is None
