"""The prepared call of experts gives the bits of the op, and steps aside for everything else."""

from typing import Any

import pytest
import torch
from native_weights import Kind, every_float, make_weight, needs_native
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from quanto_hf.ops import GroupedWeight, expert_linear, expert_linear_op
from quanto_hf.ops.cpu.library import NATIVE

pytestmark = needs_native

KINDS = [Kind("int8", -1), Kind("int4", 64, True), Kind("int2", 96), Kind("float8_e4m3fn", -1), Kind("nf4", 32)]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
E, N, K = 4, 17, 200


class Stack:
    """The stored weights of some experts."""

    def __init__(self, kind: Kind = KINDS[1]) -> None:
        each = [make_weight(kind, N, K, seed=i) for i in range(E)]
        self.packed, self.scale = (torch.stack([getattr(w, name) for w in each]) for name in ("packed", "scale"))
        self.zero = torch.stack([w.offset() for w in each]) if kind.asymmetric else None
        self.kind = kind

    def bind(self) -> Any:
        return expert_linear_op.bind(self.weight())

    def weight(self) -> GroupedWeight:
        return GroupedWeight(self.packed, self.scale, self.zero, self.kind.qtype, self.kind.group_size, K)

    def op(self, x: torch.Tensor, experts: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return expert_linear(x, experts, self.weight(), bias)


@every_kind
@every_float
@pytest.mark.parametrize("m", [1, 2, 8, 9, 70])
def test_it_gives_the_bits_of_the_op(kind: Kind, dtype: torch.dtype, m: int):
    stack, x, experts = Stack(kind), torch.randn(m, K).to(dtype), torch.randint(0, E, (m,))
    call, bias = stack.bind(), torch.randn(E, N).to(dtype)
    assert torch.equal(call(x, experts, None), stack.op(x, experts))
    assert torch.equal(call(x, experts, bias), stack.op(x, experts, bias))


X, IDS, B = torch.randn(3, K), torch.tensor([2, 0, 2]), torch.randn(E, N)
ASIDE = {
    "x-gradient": (X.clone().requires_grad_(), IDS, None),
    "x-strided": (torch.randn(K, 3).T, IDS, None),
    "x-float64": (X.double(), IDS, None),
    "x-1-d": (X[0], IDS[:1], None),
    "x-3-d": (X[None], IDS[:1], None),
    "x-narrow": (X[:, :-1].contiguous(), IDS, None),
    "x-meta": (X.to("meta"), IDS, None),
    "x-subclass": (X.as_subclass(type("Tagged", (torch.Tensor,), {})), IDS, None),
    "x-negative-bit": (torch.complex(X, X).conj().imag, IDS, None),
    "no-rows": (X[:0], IDS[:0], None),
    "ids-fewer": (X, IDS[:2], None),
    "ids-more": (X, torch.tensor([2, 0, 2, 1]), None),
    "ids-2-d": (X, IDS[None], None),
    "ids-int32": (X, IDS.int(), None),
    "ids-strided": (X, torch.stack([IDS, IDS], 1)[:, 0], None),
    "ids-meta": (X, IDS.to("meta"), None),
    "ids-negative-bit": (X, torch._neg_view(-IDS), None),
    "ids-subclass": (X, IDS.as_subclass(type("Tagged", (torch.Tensor,), {})), None),
    "ids-below": (X, torch.tensor([2, -1, 0]), None),
    "ids-above": (X, torch.tensor([2, 0, E]), None),
    "ids-far": (X, torch.tensor([2, 0, 2**62]), None),
    "bias-gradient": (X, IDS, B.clone().requires_grad_()),
    "bias-dtype": (X, IDS, B.half()),
    "bias-shape": (X, IDS, B[0]),
    "bias-fewer": (X, IDS, B[1:]),
    "bias-strided": (X, IDS, torch.randn(N, E).T),
    "bias-meta": (X, IDS, B.to("meta")),
}


@pytest.mark.parametrize("args", ASIDE.values(), ids=ASIDE)
def test_it_steps_aside(args: Any):
    call = Stack().bind()
    assert call(X, IDS, B) is not None
    assert call(*args) is None


def test_without_gradients_what_wants_one_is_served():
    stack = Stack()
    with torch.no_grad():
        made = stack.bind()(X.clone().requires_grad_(), IDS, B.clone().requires_grad_())
    assert torch.equal(made, stack.op(X, IDS, B)) and not made.requires_grad


def test_tensors_may_lie_at_any_address():
    def odd(tensor: torch.Tensor) -> torch.Tensor:
        data = b"-" + tensor.contiguous().view(torch.uint8).numpy().tobytes()
        return torch.frombuffer(bytearray(data), dtype=tensor.dtype, offset=1).view(tensor.shape)

    stack = Stack()
    expected = stack.op(X, IDS, B)
    stack.packed, stack.scale, stack.zero = odd(stack.packed), odd(stack.scale), odd(stack.zero)
    x, ids, bias = odd(X), odd(IDS), odd(B)
    assert all(t.data_ptr() % t.itemsize for t in (x, ids, bias, stack.scale, stack.zero))
    assert torch.equal(stack.bind()(x, ids, bias), expected) and torch.equal(stack.op(x, ids, bias), expected)


MOVES = {
    "elsewhere": lambda t: t.clone(),
    "fewer-experts": lambda t: t[:-1],
    "another-shape": lambda t: t.view(-1, t.shape[-1]),
    "another-dtype": lambda t: t.view(torch.int8 if t.dtype is torch.uint8 else torch.float16),
    "strided": lambda t: t.as_strided(t.shape, (0, t.shape[2], 1)),
    "let-go": lambda t: t.new_empty(0),
}


@pytest.mark.parametrize("name", ["packed", "scale", "zero"])
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_it_steps_aside_once_the_weights_are_other_memory(name: str, move: Any):
    stack = Stack()
    call, tensor = stack.bind(), getattr(stack, name)
    expected, kept = call(X, IDS, B), tensor.data
    tensor.data = move(tensor.data)
    assert call(X, IDS, B) is None
    tensor.data = kept
    assert torch.equal(call(X, IDS, B), expected)


def test_it_steps_aside_where_torch_looks_on():
    call = Stack().bind()

    def seen(x: torch.Tensor) -> torch.Tensor:
        assert call(x, IDS, None) is None
        return x

    assert call(X, IDS, None) is not None
    with FakeTensorMode(allow_non_fake_inputs=True):
        seen(X)
    torch.func.vmap(seen)(X[None])
    torch.func.grad(lambda x: seen(x).sum())(X)
    torch.jit.trace(seen, (X,), check_trace=False)
    with forward_ad.dual_level():
        seen(forward_ad.make_dual(X, X))
    assert call(X, IDS, None) is not None


def test_a_library_that_is_wrong_here_is_not_called(monkeypatch):
    calls: list[Any] = []
    monkeypatch.setattr(NATIVE, "expert_linear", lambda *args: calls.append(args))
    monkeypatch.setattr(expert_linear_op, "why_wrong", lambda *args: "it disagrees with the reference")
    assert Stack().bind()(X, IDS, None) is None and not calls


def test_there_is_none_for_weights_that_are_not_plain_memory_and_for_the_reference(monkeypatch):
    stack = Stack()
    stack.packed = stack.packed.repeat_interleave(2, 0)[::2]
    assert stack.bind() is None
    stack = Stack()
    stack.scale = stack.scale[1:]
    with pytest.raises(ValueError, match=r"scale.*\(4, 17, 4\).*\(3, 17, 4\)"):
        stack.bind()
    stack = Stack()
    assert stack.bind() is not None
    monkeypatch.setenv("QUANTO_HF_REFERENCE", "1")
    assert stack.bind() is None
