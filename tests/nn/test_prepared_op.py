"""PREPARED layers in graphs of torch.compile: one node each, with the bits of eager mode."""

import copy
from typing import Any

import pytest
import torch
from tiny_models import tokens
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import quanto_hf
from quanto_hf import QuantoConfig
from quanto_hf.fit import Absmax, fit_by_name
from quanto_hf.nn import QConv1d, QConvTranspose1d, QEmbedding, QLinear
from quanto_hf.nn.observers import MinMaxObserver
from quanto_hf.ops import OPS
from quanto_hf.qtypes import qtype
from quanto_hf.schemes import make_scheme

K, N = 80, 33
# how inputs are rounded: number type, and whether with a static scale
INPUTS = {"weight-only": (None, False), "x-int8": ("int8", False), "x-int8-static": ("int8", True)}
every_input = pytest.mark.parametrize("activations, static", INPUTS.values(), ids=INPUTS)
learned_or_not = pytest.mark.parametrize("learned", [False, True], ids=["fit", "learned"])


def prepared(
    source: nn.Module, weights: str, activations: str | None = None, static: bool = False, learned: bool = False,
    fit: Any = None,
) -> Any:  # fmt: skip
    """A PREPARED layer of the class for ``source``."""
    kinds = {nn.Linear: QLinear, nn.Conv1d: QConv1d, nn.ConvTranspose1d: QConvTranspose1d, nn.Embedding: QEmbedding}
    layer = kinds[type(source)].from_module(source, make_scheme(weights), activations and qtype(activations), fit)
    if static:
        # values of more than 2.5 are beyond it
        layer.make_static(2.5 / layer.activations.qmax)
    if learned:
        layer.learn_scales()
    return layer


def assert_same_bits(layer: Any, x: torch.Tensor, fullgraph: bool = True, backend: Any = "aot_eager") -> None:
    """What a compiled copy of a layer gives, and the gradients of everything, are those of the layer."""
    torch._dynamo.reset()
    other = copy.deepcopy(layer)
    one, two = (x.clone().requires_grad_(x.is_floating_point()) for _ in range(2))
    wanted, made = layer(one), torch.compile(other, fullgraph=fullgraph, backend=backend)(two)
    assert made.dtype == wanted.dtype and torch.equal(made, wanted)
    grad = torch.randn_like(wanted)
    wanted.backward(grad)
    made.backward(grad)
    pairs = zip(layer.named_parameters(), other.parameters(), strict=True)
    gradients = {"x": (one.grad, two.grad)} if x.is_floating_point() else {}
    gradients |= {name: (a.grad, b.grad) for (name, a), b in pairs if a.requires_grad}
    assert gradients
    for name, (a, b) in gradients.items():
        assert a is not None and a.dtype == b.dtype and torch.equal(a, b), name


@pytest.mark.parametrize("weights", ["int8", "int4"])
@every_input
@learned_or_not
def test_a_linear_layer(weights: str, activations: str | None, static: bool, learned: bool):
    assert_same_bits(prepared(nn.Linear(K, N), weights, activations, static, learned), torch.randn(2, 3, K))


SOURCES = {
    "conv": (nn.Conv1d(8, 6, 3), torch.randn(2, 8, 9)),
    "conv-transpose": (nn.ConvTranspose1d(8, 6, 3), torch.randn(2, 8, 9)),
    "embedding": (nn.Embedding(20, 40), torch.tensor([[1, 2], [3, 1]])),
}


@pytest.mark.parametrize("source, x", SOURCES.values(), ids=SOURCES)
@learned_or_not
def test_other_layers(source: nn.Module, x: torch.Tensor, learned: bool):
    static = not isinstance(source, nn.Embedding)
    layer = prepared(copy.deepcopy(source), "int4", "int8" if static else None, static, learned)
    assert_same_bits(layer, x)


@pytest.mark.parametrize("weights", ["int2", "nf4", "float8"])
def test_every_kind_of_scheme_has_a_text(weights: str):
    assert_same_bits(prepared(nn.Linear(K, N, bias=False), weights), torch.randn(3, K))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype):
    assert_same_bits(prepared(nn.Linear(K, N, dtype=dtype), "int4", "int8"), torch.randn(3, K).to(dtype))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_other_backends(backend: str):
    assert_same_bits(prepared(nn.Linear(K, N), "int4"), torch.randn(3, K), backend=backend)


@pytest.mark.parametrize("fit", ["minmax", fit_by_name("mse")], ids=["by-name", "as-object"])
def test_the_fit_is_the_one_of_the_layer(fit: Any):
    assert_same_bits(prepared(nn.Linear(K, N), "int4", fit=fit), torch.randn(3, K))


class Own(Absmax):
    """A fit of the user's own, which no graph can name."""

    name = "own"


@pytest.mark.parametrize("source, x", [(nn.Linear(K, N), torch.randn(3, K)), SOURCES["conv"]], ids=["linear", "conv"])
def test_a_fit_of_the_users_own_breaks_the_graph(source: nn.Module, x: torch.Tensor):
    assert_same_bits(prepared(source, "int8", fit=Own()), x, fullgraph=False)


def test_a_layer_that_is_calibrated_breaks_the_graph():
    layer = prepared(nn.Linear(K, N), "int8", "int8", static=True)
    layer.start_observing(MinMaxObserver())
    torch._dynamo.reset()
    compiled, x = torch.compile(layer, backend="aot_eager"), torch.randn(3, K)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    assert layer.observed


def test_only_what_is_trained_gets_a_gradient():
    torch._dynamo.reset()
    layer = prepared(nn.Linear(K, N), "int4", learned=True)
    layer.requires_grad_(False).learned_scale.requires_grad_()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(3, K)).sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is not None] == ["learned_scale"]


def test_a_graph_serves_every_number_of_rows_and_sees_the_weight_change():
    torch._dynamo.reset()
    layer, counter = prepared(nn.Linear(K, N), "int4"), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for rows in (5, 2, 9, 33):
        x = torch.randn(rows, K)
        with torch.no_grad():
            layer.weight.mul_(1.5)
            assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == 1


def test_transforms_inside_of_a_compiled_function():
    torch._dynamo.reset()
    layer, x = prepared(nn.Linear(K, N), "int8"), torch.randn(3, K)
    run = lambda x: torch.func.grad(lambda y: layer(y).sum())(x)  # noqa: E731
    torch.testing.assert_close(torch.compile(run, backend="aot_eager")(x), run(x))


def samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    scheme = make_scheme("int4")
    weight = torch.randn(5, K)
    found, text = scheme.quantize(weight), str(scheme.to_dict())
    x, w, scale, zero, bias = (
        t.clone().requires_grad_()
        for t in (torch.randn(3, K), weight, found["scale"].float(), found["zero"].float(), torch.randn(5))
    )
    x_scale = torch.tensor([0.1], requires_grad=True)
    ops = torch.ops.quanto_hf
    return {
        "product": (ops.prepared_linear.default, (x, w, None, None, None, text, "minmax", None, bias)),
        "product-learned": (ops.prepared_linear.default, (x, w, scale, zero, x_scale, text, None, "int8", None)),
        "weight": (ops.prepared_weight.default, (w, None, None, text, None)),
        "weight-learned": (ops.prepared_weight.default, (w, scale, zero, text, None)),
    }


@pytest.mark.parametrize("name", ["product", "product-learned", "weight", "weight-learned"])
def test_torch_library_finds_no_fault(name: str):
    op, args = samples()[name]
    torch.library.opcheck(op, args)
    # they have no kernels to choose from
    assert op._schema.name.removeprefix("quanto_hf::") not in OPS


def test_a_model_that_is_trained_is_one_graph_with_the_bits_of_eager_mode():
    import transformers

    torch._dynamo.reset()
    load = transformers.AutoModelForCausalLM.from_pretrained
    config = QuantoConfig("int4", qat=True)
    model = load(quanto_hf.tiny_lm(), quantization_config=config, dtype=torch.float32).train()
    other = copy.deepcopy(model)
    losses = []
    for run in (model, torch.compile(other, fullgraph=True, backend="aot_eager")):
        loss = run(input_ids=tokens(), labels=tokens(), use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
