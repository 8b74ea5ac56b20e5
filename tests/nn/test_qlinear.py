"""QLinear: an nn.Linear to everybody else, whose stored tensors nothing but a checkpoint changes."""

import copy
import doctest
import importlib
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from quanto_hf.nn import QLinear, qmodule_for
from quanto_hf.nn.qattention import QAttentionOutput
from quanto_hf.nn.stored import StoredParameter
from quanto_hf.qtypes import QTYPES, qint8, qtype
from quanto_hf.schemes import make_scheme

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
every_weight = pytest.mark.parametrize("weights", QTYPES)
every_float = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)

K, N = 80, 33  # columns that end in a short group, an odd number of rows

# Roundings, in units of the last place, of a product of 80 columns whose terms are below 1: weight, sum, result.
ATOL = {torch.float32: 80 * 2**-24, torch.bfloat16: 4 * 2**-8, torch.float16: 4 * 2**-11}


def unfrozen(
    weights: str, activations: str | None = None, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> QLinear:
    source = nn.Linear(K, N, dtype=dtype)
    return QLinear.from_module(source, make_scheme(weights), activations and qtype(activations), **kwargs)


def frozen(weights: str, activations: str | None = None, dtype: torch.dtype = torch.float32) -> QLinear:
    layer = unfrozen(weights, activations, dtype)
    layer.freeze()
    return layer


def stored(layer: QLinear) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items() if name != "bias"}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(t.dtype == two[n].dtype and torch.equal(t, two[n]) for n, t in one.items())


def check(made: torch.Tensor, expected: torch.Tensor) -> None:
    assert made.dtype == expected.dtype
    torch.testing.assert_close(made, expected, rtol=4 * torch.finfo(made.dtype).eps, atol=ATOL[made.dtype])


# ---------------------------------------------------------------------------------------------------- what it is


@every_weight
def test_it_is_a_linear_that_holds_stored_parameters_without_gradients(weights: str):
    layer, scheme = frozen(weights), make_scheme(weights)
    assert isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (K, N)
    specs = scheme.tensors((N, K), torch.float32)
    assert list(layer.state_dict()) == [*(f"weight_{name}" for name in specs), "bias"]
    for name, spec in specs.items():
        parameter = layer.get_parameter(f"weight_{name}")
        assert isinstance(parameter, StoredParameter) and not parameter.requires_grad
        assert (tuple(parameter.shape), parameter.dtype) == (spec.shape, spec.dtype)
    assert layer.bias.requires_grad


def test_it_replaces_exactly_a_linear():
    assert qmodule_for(nn.Linear(2, 2)) is QLinear
    # the output projection of torch's attention, which goes with the attention (quanto_hf/flow/leaving.py)
    made = qmodule_for(nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2))
    assert made is not QLinear and issubclass(made, QAttentionOutput)


@every_weight
@every_float
def test_its_weight_reads_as_a_float_tensor(weights: str, dtype: torch.dtype):
    layer = frozen(weights, dtype=dtype)
    assert layer.weight.shape == (N, K) and layer.weight.dtype == dtype and layer.weight.device == layer.bias.device
    assert torch.equal(layer.weight, layer.scheme.dequantize(layer.tensors(), K, dtype))
    # transformers initialises anew what has not this mark
    assert layer.weight._is_hf_initialized


@every_weight
@every_float
def test_the_product_with_the_weight_that_it_shows_is_what_it_computes(weights: str, dtype: torch.dtype):
    layer, x = frozen(weights, dtype=dtype), torch.randn(2, 3, K).to(dtype)
    check(layer(x), F.linear(x, layer.weight, layer.bias))
    check(layer.to_float()(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("bias", FLOATS.values(), ids=[f"bias-{name}" for name in FLOATS])
@pytest.mark.parametrize("x", FLOATS.values(), ids=[f"x-{name}" for name in FLOATS])
@pytest.mark.parametrize("weights", ["int8", "int4", "float8_e4m3fn"])
def test_the_output_has_the_dtype_of_the_input_whatever_weight_and_bias_have(weights: str, x, bias):
    layer = frozen(weights, dtype=bias)
    value = torch.randn(3, K).to(x)
    check(layer(value), F.linear(value, layer.scheme.dequantize(layer.tensors(), K, x), layer.bias.to(x)))


@every_weight
def test_its_text_names_features_scheme_and_state(weights: str):
    assert (
        repr(frozen(weights)) == f"QLinear(in_features=80, out_features=33, bias=True, weights={make_scheme(weights)})"
    )
    assert repr(unfrozen(weights, "int8")).endswith(", activations=int8, not frozen)")


# ---------------------------------------------------------------------------------------------------- FLOAT and FROZEN


@every_weight
@every_float
@pytest.mark.parametrize("activations", [None, "int8", "float8"], ids=["weight-only", "x-int8", "x-float8"])
def test_freezing_changes_no_output(weights: str, dtype: torch.dtype, activations: str | None):
    layer, x = unfrozen(weights, activations, dtype), torch.randn(3, K).to(dtype)
    before = layer(x)
    layer.freeze()
    check(layer(x), before)


@every_weight
def test_the_gradient_passes_straight_through_the_rounding_of_a_float_weight(weights: str):
    layer, x, grad = unfrozen(weights), torch.randn(3, K, requires_grad=True), torch.randn(3, N)
    layer(x).backward(grad)
    check(layer.weight.grad, grad.T @ x.detach())
    check(layer.bias.grad, grad.sum(0))
    expected = copy.deepcopy(layer)
    expected.freeze()
    check(x.grad, grad @ expected.weight)


@every_weight
@every_float
def test_a_frozen_layer_passes_gradients_to_input_and_bias(weights: str, dtype: torch.dtype):
    layer, x = frozen(weights, dtype=dtype), torch.randn(K).to(dtype).requires_grad_()
    grad = torch.randn(N).to(dtype)
    layer(x).backward(grad)
    check(x.grad, grad @ layer.weight)
    assert torch.equal(layer.bias.grad, grad)


def test_a_float_layer_shares_its_parameters_and_its_mode_with_the_linear():
    source = nn.Linear(K, N).eval()
    layer = QLinear.from_module(source, make_scheme("int4"))
    assert layer.weight is source.weight and layer.bias is source.bias and not layer.training
    assert list(layer.state_dict()) == ["weight", "bias"]
    layer.weight = nn.Parameter(torch.ones(N, K))
    assert layer.state_dict()["weight"].eq(1).all()


def test_freezing_lets_go_of_the_float_weight_notes_its_error_and_is_done_once():
    layer = unfrozen("int4")
    weight = layer.weight.detach()
    layer.freeze()
    # all 33 rows are among the 64 that are looked at
    assert layer.weight_error == pytest.approx(float((layer.weight - weight).norm() / weight.norm()), rel=1e-5)
    kept = stored(layer)
    layer.freeze()
    assert same(stored(layer), kept) and "weight" not in layer.state_dict()


def test_a_weight_that_cannot_be_frozen_stays_float():
    layer = unfrozen("int4")
    with torch.no_grad():
        layer.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        layer.freeze()
    assert not layer.is_frozen and isinstance(layer.weight, nn.Parameter)


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: setattr(layer, "weight", torch.zeros(N, K)),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(N, K))),
        lambda layer: layer.register_parameter("weight", nn.Parameter(torch.zeros(N, K))),
        lambda layer: layer.reset_parameters(),
    ],
    ids=["tensor", "parameter", "register_parameter", "reset_parameters"],
)
def test_writing_the_weight_of_a_frozen_layer_is_an_error_that_says_what_to_do(write):
    layer = frozen("int4")
    kept = stored(layer)
    with pytest.raises(RuntimeError, match=r"cannot be written.*Replace the layer by an nn.Linear.*dequantize"):
        write(layer)
    assert same(stored(layer), kept)


# ---------------------------------------------------------------------------------------------------- copies and dtypes

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "share_memory": lambda layer: copy.deepcopy(layer).share_memory(),
}


def saved_and_loaded(layer: QLinear) -> QLinear:
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    empty = QLinear(K, N, scheme=layer.scheme, activations=layer.activations, dtype=layer.weight_dtype)
    empty.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    return empty


def assigned_to_meta(layer: QLinear) -> QLinear:
    empty = QLinear(K, N, scheme=layer.scheme, activations=layer.activations, dtype=layer.weight_dtype, device="meta")
    empty.load_state_dict(layer.state_dict(), strict=True, assign=True)
    return empty


@pytest.mark.parametrize(
    "make",
    [*COPIES.values(), saved_and_loaded, assigned_to_meta],
    ids=[*COPIES, "state_dict", "state_dict-assign"],
)
@every_weight
def test_a_copy_is_the_same_bit_by_bit(weights: str, make):
    layer, x = frozen(weights, "int8", torch.bfloat16), torch.randn(3, K).bfloat16()
    made = make(layer)
    assert same(stored(made), stored(layer))
    assert made.scheme == layer.scheme and made.weight.dtype == torch.bfloat16
    assert torch.equal(made(x), layer(x))
    assert [p.requires_grad for p in made.parameters()] == [p.requires_grad for p in layer.parameters()]


def test_shared_memory_is_shared():
    layer = frozen("int4").share_memory()
    assert all(parameter.is_shared() for parameter in layer.parameters())


def test_a_layer_works_in_a_spawned_process():
    layer, x = frozen("int4").requires_grad_(False), torch.randn(3, K)
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        made = pool.apply(nn.Module.__call__, (layer, x))
    check(made, layer(x))


CASTS = {
    "half()": (lambda m: m.half(), torch.float16),
    "bfloat16()": (lambda m: m.bfloat16(), torch.bfloat16),
    "to(bf16)": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "type(fp16)": (lambda m: m.type(torch.float16), torch.float16),
    "parent.half()": (lambda m: nn.Sequential(m).half()[0], torch.float16),
    "there-and-back": (lambda m: m.half().float(), torch.float32),
}


@pytest.mark.parametrize("cast, dtype", CASTS.values(), ids=CASTS)
@every_weight
def test_a_cast_converts_bias_and_shown_weight_and_leaves_the_stored_bits(weights: str, cast, dtype: torch.dtype):
    layer = frozen(weights)
    kept, bias, x = stored(layer), layer.bias.detach().clone(), torch.randn(3, K)
    made = cast(layer)
    assert made is layer and same(stored(layer), kept)
    assert layer.bias.dtype == layer.weight.dtype == dtype
    check(layer.bias.detach().float(), bias.to(torch.float16 if dtype is torch.float32 else dtype).float())
    check(layer(x.to(dtype)), F.linear(x.to(dtype), layer.weight, layer.bias))


def test_a_cast_of_a_float_layer_is_that_of_a_linear():
    layer = unfrozen("int4").bfloat16()
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    layer.freeze()
    assert layer.weight.dtype == torch.bfloat16


@every_weight
def test_the_meta_device_has_shapes_only(weights: str):
    layer = frozen(weights, dtype=torch.bfloat16).to("meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert layer.weight.device.type == "meta" and layer.weight.shape == (N, K) and layer.weight.dtype == torch.bfloat16
    made = layer(torch.empty(2, K, device="meta", dtype=torch.bfloat16))
    assert made.shape == (2, N) and made.device.type == "meta"
    back = layer.to_empty(device="cpu")
    assert {name: t.dtype for name, t in stored(back).items()} == {
        n: t.dtype for n, t in stored(frozen(weights)).items()
    }


# ---------------------------------------------------------------------------------------------------- state dicts


def test_every_key_that_does_not_fit_is_named():
    state = {f"0.{name}": tensor for name, tensor in frozen("int4").state_dict().items()}
    del state["0.bias"]
    state["0.weight"] = torch.zeros(N, K)
    state["0.weight_packed"] = state["0.weight_packed"].to(torch.int32)
    state["0.weight_scale"] = state["0.weight_scale"].float()
    state["0.weight_zero"] = state["0.weight_zero"][:, :1]
    model = nn.Sequential(frozen("int4"))
    kept = stored(model[0])
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(state)
    lines = str(caught.value).splitlines()
    for words in (
        ["Missing", '"0.bias"'],
        ["Unexpected", '"0.weight"'],
        ["dtype mismatch", "0.weight_packed", "torch.int32", "torch.uint8"],
        ["dtype mismatch", "0.weight_scale", "torch.float32", "torch.bfloat16"],
        ["size mismatch", "0.weight_zero"],
    ):
        assert any(all(word in line for word in words) for line in lines), (words, lines)
    assert same(stored(model[0]), kept)


@pytest.mark.parametrize("name", ["packed", "scale", "zero"])
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_tensor_of_another_dtype_is_refused_and_not_converted(name: str, assign: bool):
    layer = frozen("int4")
    kept, state = stored(layer), layer.state_dict()
    state[f"weight_{name}"] = state[f"weight_{name}"].to(torch.float16)
    with pytest.raises(RuntimeError, match=f"dtype mismatch for weight_{name}.*torch.float16"):
        layer.load_state_dict(state, assign=assign)
    assert same(stored(layer), kept)


def test_float_and_frozen_state_dicts_are_not_mistaken_for_each_other():
    with pytest.raises(RuntimeError, match=r'Missing.*"weight_packed"') as caught:
        frozen("int4").load_state_dict(unfrozen("int4").state_dict())
    assert 'Unexpected key(s) in state_dict: "weight"' in str(caught.value)
    with pytest.raises(RuntimeError, match=r'Unexpected.*"weight_packed"'):
        unfrozen("int4").load_state_dict(frozen("int4").state_dict())


# ---------------------------------------------------------------------------------------------------- torch's modes


@every_weight
@pytest.mark.parametrize("make", [unfrozen, frozen], ids=["float", "frozen"])
def test_autocast_computes_in_its_dtype(weights: str, make):
    layer, x = make(weights), torch.randn(3, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = layer(x)
    assert made.dtype == torch.bfloat16
    reference = copy.deepcopy(layer)
    reference.freeze()
    check(made, F.linear(x.bfloat16(), reference.weight.bfloat16(), layer.bias.bfloat16()))
    with torch.autocast("cpu", enabled=False):
        assert layer(x).dtype == torch.float32


@every_weight
def test_a_layer_first_run_in_inference_mode_can_be_trained_through_later(weights: str):
    layer, x = frozen(weights), torch.randn(3, K)
    with torch.inference_mode():
        inside = layer(x)
    x.requires_grad_()
    outside = layer(x)
    outside.sum().backward()
    check(outside.detach(), inside)
    check(x.grad, layer.weight.sum(0).expand(3, K))


@every_weight
@pytest.mark.parametrize("activations", [None, "int8"], ids=["weight-only", "x-int8"])
def test_torch_compile_makes_one_graph_for_all_batch_sizes(weights: str, activations: str | None):
    # each type of weights meets both backends, and so do both types of activations
    backend = ("eager", "aot_eager")[(list(QTYPES).index(weights) + (activations is None)) % 2]
    torch._dynamo.reset()
    layer, counter = frozen(weights, activations), CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for rows in (3, 5, 17):
        x = torch.randn(rows, K)
        with torch.no_grad():
            check(compiled(x), layer(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_passes_gradients(backend: str):
    torch._dynamo.reset()
    layer, x = frozen("int4"), torch.randn(3, K, requires_grad=True)
    torch.compile(layer, fullgraph=True, backend=backend)(x).sum().backward()
    check(x.grad, layer.weight.sum(0).expand(3, K))
    check(layer.bias.grad, torch.full((N,), 3.0))


def test_fake_quantized_inputs_have_gradients_that_pass_straight_through():
    layer, x = frozen("int8", "int8"), torch.randn(3, K, requires_grad=True)
    assert layer.activations == qint8
    layer(x).sum().backward()
    check(x.grad, layer.weight.sum(0).expand(3, K))


def test_the_examples_in_the_docstrings_are_true():
    result = doctest.testmod(importlib.import_module("quanto_hf.nn.qlinear"))
    assert result.attempted and not result.failed
