"""A prepared call is the op, or it says that it cannot serve and the layer takes the general way."""

import copy
import pickle

import pytest
import torch
from torch import nn

from quanto_hf.nn import QLinear
from quanto_hf.ops.cpu import bound, selfcheck
from quanto_hf.ops.cpu.library import NATIVE
from quanto_hf.qtypes import QTYPES
from quanto_hf.schemes import make_scheme

pytestmark = pytest.mark.skipif(NATIVE is None, reason="no native kernels here")
WEIGHTS = ["int8", "int4", "int2", "nf4", "float8"]


def make(weights: str = "int4", dtype: torch.dtype = torch.bfloat16, activations: str | None = None) -> QLinear:
    torch.manual_seed(0)
    linear = nn.Linear(200, 33, dtype=dtype)
    kind = None if activations is None else QTYPES[activations]
    layer = QLinear.from_module(linear, make_scheme(weights), activations=kind)
    layer.freeze()
    return layer.requires_grad_(False)


def slow(layer: QLinear, x: torch.Tensor) -> torch.Tensor:
    """The general way."""
    return layer.scheme.linear(x, layer.tensors(), layer.bias)


@pytest.fixture(params=WEIGHTS)
def layer(request) -> QLinear:
    return make(request.param)


@pytest.mark.parametrize("shape", [(200,), (1, 200), (2, 9, 200), (4, 8, 3, 200)], ids=str)
def test_it_equals_the_op_for_inputs_of_any_dimensions(layer, shape):
    x = torch.randn(shape).bfloat16()
    assert torch.equal(layer(x), slow(layer, x))
    assert layer._bound[1](x, layer.bias) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_it_serves_every_float_type_with_a_bias_of_another(dtype):
    layer = make()
    x = torch.randn(3, 200).to(dtype)
    torch.testing.assert_close(
        layer(x).float(), x.float() @ layer.dequantized().float().T + layer.bias, rtol=1e-2, atol=2e-2
    )


def test_it_leaves_gradients_views_and_empty_batches_to_the_general_way(layer):
    x = torch.randn(4, 200).bfloat16()
    call = layer._bind()[1]
    strided = torch.randn(200, 4).bfloat16().T
    assert call(x.clone().requires_grad_(), layer.bias) is None
    assert call(strided, layer.bias) is None
    assert call(x[:0], layer.bias) is None
    assert call(x.double(), None) is None
    assert layer(x[:0]).shape == (0, 33)
    torch.testing.assert_close(layer(strided), layer(strided.contiguous()))
    wanting = x.clone().requires_grad_()
    layer(wanting).sum().backward()
    assert wanting.grad.shape == x.shape


def test_a_wrong_width_is_an_error_with_the_numbers(layer):
    with pytest.raises(ValueError, match="199"):
        layer(torch.randn(2, 199).bfloat16())


def test_a_negative_view_is_resolved_first():
    layer = make(dtype=torch.float32)
    x = torch.complex(torch.zeros(2, 200), torch.randn(2, 200)).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(layer(x), slow(layer, x.clone()))


def test_data_that_is_swapped_behind_a_parameter_is_seen(layer):
    x = torch.randn(2, 200).bfloat16()
    before = layer(x)
    other = make(str(layer.scheme.qtype))
    other.weight_scale.data *= 2
    layer.weight_scale.data = other.weight_scale.data
    after = layer(x)
    assert not torch.equal(before, after)
    assert torch.equal(after, slow(layer, x))


def test_a_parameter_that_is_replaced_is_seen(layer):
    x = torch.randn(2, 200).bfloat16()
    layer(x)
    layer.weight_scale = nn.Parameter(layer.weight_scale * 3, requires_grad=False)
    assert torch.equal(layer(x), slow(layer, x))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_a_copy_prepares_its_own_call(layer, copied):
    x = torch.randn(2, 200).bfloat16()
    wanted = layer(x)
    other = copied(layer)
    layer.weight_scale.data.zero_()
    assert torch.equal(other(x), wanted)


def test_autocast_inference_mode_and_vmap(layer):
    x = torch.randn(3, 200)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    with torch.inference_mode():
        assert torch.equal(layer(x.bfloat16()), slow(layer, x.bfloat16()))
    mapped = torch.func.vmap(layer)(x.bfloat16())
    torch.testing.assert_close(mapped, layer(x.bfloat16()), rtol=2e-2, atol=2e-2)


def test_torch_compile_makes_one_graph_for_all_numbers_of_rows(layer):
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 5, 40):
        x = torch.randn(rows, 200).bfloat16()
        torch.testing.assert_close(compiled(x), layer(x))


def test_int8_activations_are_those_of_the_emulation():
    layer = make("int8", torch.float32, "int8")
    for rows in (1, 8, 30):
        x = torch.randn(rows, 200)
        fast = layer(x)
        assert layer._bound[1] is None or layer._bound[1](x, layer.bias) is not None
        emulated = layer(x.clone().requires_grad_()).detach()
        torch.testing.assert_close(fast, emulated, rtol=1e-5, atol=1e-5)


def test_a_kernel_that_is_wrong_is_reported_once_and_never_used(monkeypatch):
    layer, x = make(), torch.randn(2, 200).bfloat16()
    wanted = x.float() @ layer.dequantized().float().T + layer.bias

    class Broken:
        def __getattr__(self, name):
            return getattr(NATIVE, name)

        def linear(self, *args):
            pass  # leaves the result as it finds it

    from quanto_hf.ops.cpu import call

    selfcheck.why_wrong.cache_clear()
    try:
        for module in (call, bound):
            monkeypatch.setattr(module, "NATIVE", Broken())
        with pytest.warns(RuntimeWarning, match=r"disagrees with the reference.*quanto-hf kernels") as seen:
            outputs = [layer(x) for _ in range(3)]
        assert len(seen) == 1
        for output in outputs:
            torch.testing.assert_close(output.float(), wanted, rtol=2e-2, atol=2e-2)
    finally:
        selfcheck.why_wrong.cache_clear()
