"""``ExpertProduct`` is the op ``expert_linear`` of what a module holds: its numbers, gradients and errors."""

import copy
import pickle
from typing import Any

import pytest
import torch
from native_weights import needs_native
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from quanto_hf.nn.expert_product import ExpertProduct
from quanto_hf.schemes import make_scheme

E, N, K = 3, 5, 200
X, IDS = torch.randn(4, K), torch.tensor([0, 2, 1, 0])
every_weight = pytest.mark.parametrize("weights", ["int8", "int4", "int2", "float8", "nf4"])


class Layer(nn.Module):
    """What a layer of experts will do with it."""

    def __init__(self, weights: str = "int4", seed: int = 0) -> None:
        super().__init__()
        self.scheme = make_scheme(weights)
        self.product = ExpertProduct(self.scheme, K, "up_")
        weight = torch.randn(E, N, K, generator=torch.Generator().manual_seed(seed))
        for name, tensor in self.scheme.quantize(weight).items():
            self.register_parameter(f"up_{name}", nn.Parameter(tensor, requires_grad=False))
        self.bias = nn.Parameter(torch.linspace(-1, 1, E * N).view(E, N), requires_grad=False)

    def forward(self, x: torch.Tensor, experts: torch.Tensor = IDS) -> torch.Tensor:
        return self.product(x, experts, self._parameters, self.bias)

    def op(self, x: torch.Tensor, experts: torch.Tensor = IDS) -> torch.Tensor:
        stored = {name: self._parameters[f"up_{name}"] for name in self.scheme.names}
        return self.scheme.expert_linear(x, experts, stored, self.bias)


def served(layer: Layer, x: torch.Tensor = X) -> bool:
    """Whether the prepared call answers."""
    bound = layer.product._bound
    return bound is not None and bound.call is not None and bound.call(x, IDS, layer.bias) is not None


@needs_native
@every_weight
def test_the_call_is_prepared_once(weights: str, monkeypatch):
    layer, made = Layer(weights), []
    right = type(layer.scheme).bind_experts
    monkeypatch.setattr(type(layer.scheme), "bind_experts", lambda *args: made.append(args) or right(*args))
    for _ in range(3):
        assert torch.equal(layer(X), layer.op(X))
    assert len(made) == 1 and served(layer)


@every_weight
@pytest.mark.parametrize("change", ["gradient", "strided", "bfloat16 under autocast", "subclass"])
def test_what_the_prepared_call_does_not_serve_is_the_op(weights: str, change: str):
    layer = Layer(weights)
    layer(X)
    x, wanted = X.clone(), X.clone()
    if change == "gradient":
        layer(x.requires_grad_()).sum().backward()
        layer.op(wanted.requires_grad_()).sum().backward()
        assert torch.equal(x.grad, wanted.grad)
    elif change == "strided":
        assert torch.equal(layer(X.T.contiguous().T), layer.op(X))
    elif change == "subclass":
        tagged = X.as_subclass(type("Tagged", (torch.Tensor,), {}))
        assert type(layer(tagged)) is type(layer.op(tagged))
    else:
        layer.bias.data = layer.bias.data.bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made = layer(x.bfloat16())
        assert made.dtype is torch.bfloat16 and torch.equal(made, layer.op(x.bfloat16()))


ERRORS = {
    "dtype": ((X.double(), IDS), ValueError, "torch.float64"),
    "1-d": ((X[0], IDS), ValueError, r"shape \(200,\)"),
    "ids-dtype": ((X, IDS.int()), ValueError, "torch.int32"),
    "ids-fewer": ((X, IDS[1:]), ValueError, r"\(4,\).*\(3,\)"),
    "id-above": ((X, torch.tensor([0, E, 0, 1])), IndexError, "expert 3 does not exist: the weight has 3 of them"),
    "id-below": ((X, torch.tensor([0, -1, 0, 1])), IndexError, "expert -1 does not exist"),
    "meta": ((X.to("meta"), IDS), ValueError, "the input is on meta, but the weight is on cpu"),
    # as many bytes as 200 codes take: the op cannot tell
    "width": ((X[:, :-1], IDS), ValueError, r"\(rows, 200\), not \(4, 199\)"),
}


@pytest.mark.parametrize("args, error, said", ERRORS.values(), ids=ERRORS)
def test_errors_are_those_of_the_op(args: Any, error: type[Exception], said: str):
    layer = Layer()
    for _ in range(2):  # before and after a call is prepared
        with pytest.raises(error, match=said):
            layer(*args)
        layer(X)


def test_data_of_another_size_is_an_error_not_a_read_behind_its_end():
    for name in ("packed", "scale", "zero"):
        layer = Layer()
        layer(X)
        tensor = layer.get_parameter(f"up_{name}")
        tensor.data = tensor.data[:-1]
        with pytest.raises(ValueError):
            layer(X)


@needs_native
@pytest.mark.parametrize("way", ["data", "parameter", "state dict", "assigned state dict"])
def test_other_weights_are_followed(way: str):
    layer, other = Layer(), Layer(seed=1)
    layer(X)
    for name in layer.scheme.names:
        new = other.get_parameter(f"up_{name}").data.clone()
        if way == "data":
            layer.get_parameter(f"up_{name}").data = new
        elif way == "parameter":
            layer.register_parameter(f"up_{name}", nn.Parameter(new, requires_grad=False))
    if "state dict" in way:
        layer.load_state_dict({n: t.clone() for n, t in other.state_dict().items()}, assign="assigned" in way)
        layer.requires_grad_(False)
    assert torch.equal(layer(X), other.op(X)) and not torch.equal(layer(X), Layer().op(X))
    assert served(layer) is (way != "data")


def test_a_parameter_that_is_missing_is_named():
    layer = Layer()
    layer(X)
    del layer.up_zero
    with pytest.raises(ValueError, match="held as up_packed, up_scale, up_zero; missing: up_zero"):
        layer(X)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_a_copy_has_a_call_of_its_own(way: Any):
    layer = Layer()
    expected = layer(X)
    other = way(layer)
    assert other.product._bound is None
    for name in layer.scheme.names:
        layer.get_parameter(f"up_{name}").data.zero_()
    assert torch.equal(other(X), expected)


def test_transforms_and_fake_tensors():
    layer = Layer()
    expected = layer(X)
    made = torch.func.vmap(layer, in_dims=(0, None))(X.view(1, 4, K), IDS)
    torch.testing.assert_close(made[0], expected, rtol=1e-4, atol=1e-4)
    gradient = torch.func.grad(lambda x: layer(x).sum())(X)
    x = X.clone().requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(gradient, x.grad, rtol=1e-4, atol=1e-4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = layer(X)
    assert isinstance(fake, FakeTensor) and fake.shape == (4, N)
    assert torch.equal(layer(X), expected)


def test_one_compiled_graph():
    torch._dynamo.reset()
    layer, counter = Layer(), CompileCounterWithBackend("aot_eager")
    expected = layer(X)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with torch.no_grad():
        assert torch.equal(compiled(X), expected) and torch.equal(compiled(X + 1), layer(X + 1))
    assert counter.frame_count == 1


def test_a_scheme_without_such_a_product_says_so():
    scheme = make_scheme("aqlm-1x8")
    product = ExpertProduct(scheme, 64)
    stored = {name: torch.empty(0) for name in scheme.names}
    with pytest.raises(ValueError, match="aqlm 1x8 g8 weights are not multiplied by expert; choose int8"):
        product(torch.randn(1, 64), torch.tensor([0]), stored)
