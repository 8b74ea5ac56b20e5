"""The op ``expert_linear``: every kernel against the products in float64, its gradients, its errors, who looks on."""

from typing import Any

import pytest
import torch
from native_weights import Exact, Kind, Weight, every_float, make_weight
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from quanto_hf.ops import GroupedWeight, expert_linear, expert_linear_grad_input, expert_linear_op, linear

KINDS = [Kind("int8", -1), Kind("int4", 64, True), Kind("int2", 16, True), Kind("float8_e5m2", -1), Kind("nf4", 32)]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)

# Ids of 5 experts: no rows; one; an expert for each row; few rows, of which none is for experts 1 and 4; all for one;
# more than the kernels for few rows take, in any order and sorted; and so many of one that they are copied in parts.
IDS = {
    "none": [],
    "one": [3],
    "each": [4, 2, 0, 1, 3],
    "few": [3, 0, 3, 2, 0, 0, 3],
    "all-of-the-last": [4] * 12,
    "many": [(7 * i * i + i) % 5 for i in range(70)],
    "sorted": sorted((7 * i * i + i) % 5 for i in range(70)),
    "parts": [0 if i % 9 else 2 for i in range(1300)],
}
every_order = pytest.mark.parametrize("ids", IDS.values(), ids=IDS)


class Experts:
    """The weights of some experts, one by one and together."""

    def __init__(self, kind: Kind, count: int = 5, rows: int = 17, columns: int = 144) -> None:
        self.each: list[Weight] = [make_weight(kind, rows, columns, seed=i) for i in range(count)]
        self.packed = torch.stack([w.packed for w in self.each])
        self.scale = torch.stack([w.scale for w in self.each])
        self.zero = torch.stack([w.zero for w in self.each]) if kind.asymmetric else None  # type: ignore[misc]
        self.kind, self.columns, self.rows = kind, columns, rows

    def linear(self, x: torch.Tensor, experts: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[Any, ...]:
        """The arguments of the op."""
        kind = self.kind
        weight = GroupedWeight(self.packed, self.scale, self.zero, kind.qtype, kind.group_size, self.columns)
        return (x, experts, weight, bias)

    def dense(self) -> torch.Tensor:
        """The weights in float64."""
        return torch.stack([w.dense() for w in self.each])

    def check(
        self,
        made: torch.Tensor,
        x: torch.Tensor,
        experts: torch.Tensor,
        bias: torch.Tensor | None = None,
        more: int = 0,
    ) -> None:
        """Each row is the product with its own expert, with ``more`` roundings to the dtype of x than in C++."""
        assert made.shape == (len(x), self.rows) and made.dtype == x.dtype and made.is_contiguous()
        for e, weight in enumerate(self.each):
            mine = experts == e
            exact = Exact.of(x[mine], weight, None if bias is None else bias[e])
            exact.bound += more * torch.finfo(x.dtype).eps / 2 * (x[mine].double().abs() @ weight.dense().abs().T)
            exact.check(made[mine])


def every_way(args: tuple[Any, ...]) -> list[Any]:
    """All that can run these arguments."""
    kernels = [kernel.run for kernel in expert_linear_op.kernels if kernel.refuses(*args) is None]
    return [expert_linear, expert_linear_op.reference, expert_linear_op.in_graph, *kernels]


@every_kind
@every_float
@every_order
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_each_row_is_the_product_with_its_own_expert(kind: Kind, dtype: torch.dtype, ids: list[int], biased: bool):
    weights, experts = Experts(kind), torch.tensor(ids, dtype=torch.int64)
    x = torch.randn(len(ids), weights.columns).to(dtype)
    bias = torch.randn(5, weights.rows).to(dtype) if biased else None
    args = weights.linear(x, experts, bias)
    for kernel in expert_linear_op.kernels:
        if kernel.refuses(*args) is None:
            # in float16 those in torch round the weight, those in C++ only the result
            more = int(kernel.name != "native" and dtype is torch.float16)
            weights.check(kernel.run(*args), x, experts, bias, more)


@every_kind
@every_order
def test_the_reference_and_the_operator_say_the_same(kind: Kind, ids: list[int]):
    weights, experts = Experts(kind, rows=3, columns=77), torch.tensor(ids, dtype=torch.int64)
    x, bias = torch.randn(len(ids), 77), torch.randn(5, 3)
    for run in every_way(weights.linear(x, experts, bias)):
        weights.check(run(*weights.linear(x, experts, bias)), x, experts, bias)


def test_a_single_expert_is_a_linear_layer():
    weights, x = Experts(KINDS[1], count=1), torch.randn(9, 144).bfloat16()
    made = expert_linear(*weights.linear(x, torch.zeros(9, dtype=torch.int64)))
    assert torch.equal(made, linear(*weights.each[0].linear(x)))


def test_experts_that_are_not_used_are_not_read():
    weights, experts = Experts(KINDS[0]), torch.tensor([1, 3, 1])
    x = torch.randn(3, 144)
    expected = expert_linear(*weights.linear(x, experts))
    weights.scale[[0, 2, 4]] = torch.nan
    assert torch.equal(expert_linear(*weights.linear(x, experts)), expected)


@every_kind
def test_nan_in_a_row_or_an_expert_stays_there(kind: Kind):
    weights, experts = Experts(kind), torch.tensor(IDS["many"])
    x = torch.randn(70, 144)
    args = weights.linear(x, experts)
    x[3] = torch.nan
    weights.scale[2] = torch.nan
    lost = (experts == 2) | (torch.arange(70) == 3)
    for run in every_way(args):
        assert torch.equal(run(*args).isnan(), lost[:, None].expand(-1, weights.rows))


@every_kind
def test_tensors_need_not_be_contiguous(kind: Kind):
    weights, experts = Experts(kind), torch.tensor(IDS["many"])
    x, bias = torch.randn(70, 144), torch.randn(5, 17)
    expected = expert_linear(*weights.linear(x, experts, bias))
    wide = torch.stack([experts, experts + 1], 1)[:, 0]
    made = expert_linear(*weights.linear(x.T.contiguous().T, wide, bias.T.contiguous().T))
    assert torch.equal(made, expected)
    # experts that lie apart: one after another, for a copy would be one of all of them
    weights.packed = weights.packed.repeat_interleave(2, 0)[::2]
    args = weights.linear(x, experts, bias)
    assert "do not lie in memory" in dict(expert_linear_op.explain(*args))["native"]
    weights.check(expert_linear(*args), x, experts, bias)


# ---------------------------------------------------------------------------------------------------- gradients


@every_kind
@every_float
@every_order
def test_gradients_are_those_of_dense_experts(kind: Kind, dtype: torch.dtype, ids: list[int]):
    weights, experts = Experts(kind, rows=7, columns=48), torch.tensor(ids, dtype=torch.int64)
    x = torch.randn(len(ids), 48).to(dtype).requires_grad_()
    bias = torch.randn(5, 7).to(dtype).requires_grad_()
    grad = torch.randn(len(ids), 7).to(dtype)
    expert_linear(*weights.linear(x, experts, bias)).backward(grad)
    dense = weights.dense()[experts]
    exact = torch.einsum("mn,mnk->mk", grad.double(), dense)
    size = torch.einsum("mn,mnk->mk", grad.double().abs(), dense.abs())
    # a rounding of the weight, of the sum over a block of rows, and of the result, and sums in float32
    bound = size * (2 * torch.finfo(dtype).eps + 8 * 2**-24) + (2**-24 if dtype is torch.float16 else 0)
    assert ((x.grad.double() - exact).abs() <= bound).all()
    exact, size = torch.zeros(5, 7).double(), torch.zeros(5, 7).double()
    exact.index_add_(0, experts, grad.double())
    size.index_add_(0, experts, grad.double().abs())
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + max(1, len(ids)) * 2**-24 * size
    assert ((bias.grad.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("wanted", ["x", "bias"])
def test_a_gradient_is_made_only_for_what_wants_one(wanted: str):
    weights, experts = Experts(KINDS[1]), torch.tensor(IDS["few"])
    x, bias = torch.randn(7, 144, requires_grad=wanted == "x"), torch.randn(5, 17, requires_grad=wanted == "bias")
    expert_linear(*weights.linear(x, experts, bias)).sum().backward()
    assert (x.grad is not None, bias.grad is not None) == (wanted == "x", wanted == "bias")


@every_kind
def test_the_backward_pass_keeps_ids_and_packed_weights_and_nothing_else(kind: Kind):
    weights, experts, saved = Experts(kind), torch.tensor(IDS["few"]), []
    x = torch.randn(7, 144, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        expert_linear(*weights.linear(x, experts))
    stored = [t.data_ptr() for t in (experts, weights.packed, weights.scale, weights.zero) if t is not None]
    assert {t.data_ptr() for t in saved} == set(stored)


# ---------------------------------------------------------------------------------------------------- errors

E = Experts(Kind("int4", 16, True), count=3, rows=5, columns=40)
X, IDS_4, B = torch.randn(4, 40), torch.tensor([0, 2, 1, 0]), torch.randn(3, 5)
W = E.linear(X, IDS_4)[2]
BAD = {
    "x-1-d": ((X[0], IDS_4, W, B), ["shape (rows, in_features)", "(40,)"]),
    "x-3-d": ((X[None], IDS_4, W, B), ["shape (rows, in_features)", "(1, 4, 40)"]),
    "x-dtype": ((X.double(), IDS_4, W, B), ["torch.float64", "float32, bfloat16 or float16"]),
    "x-width": ((X[:, :38], IDS_4, W, B), ["(rows, 40)", "(4, 38)"]),
    "columns": ((X[:, :38], IDS_4, W._replace(in_features=38), B), ["38 columns", "(experts, rows, 19)", "(3, 5, 20)"]),
    "x-device": ((X.to("meta"), IDS_4, W, B), ["the input is on meta", "the weight is on cpu"]),
    "ids-length": ((X, IDS_4[:3], W, B), ["the experts of 4 rows", "(4,)", "(3,)"]),
    "ids-2-d": ((X, IDS_4[:, None], W, B), ["(4,)", "(4, 1)"]),
    "ids-dtype": ((X, IDS_4.int(), W, B), ["torch.int64", "torch.int32"]),
    "ids-device": ((X, IDS_4.to("meta"), W, B), ["the expert ids are on meta", "the weight is on cpu"]),
    "codes-2-d": ((X, IDS_4, W._replace(packed=W.packed[0]), B), ["(experts, rows, 20)", "(5, 20)"]),
    "scale-shape": ((X, IDS_4, W._replace(scale=W.scale[:2]), B), ["scale", "(3, 5, 3)", "(2, 5, 3)"]),
    "zero-shape": ((X, IDS_4, W._replace(zero=W.zero[0]), B), ["zero", "(3, 5, 3)", "(5, 3)"]),
    "bias-1-d": ((X, IDS_4, W, B[0]), ["3 experts with 5 features", "(3, 5)", "(5,)"]),
    "bias-dtype": ((X, IDS_4, W, B.half()), ["torch.float32", "torch.float16"]),
    "qtype": ((X, IDS_4, W._replace(qtype="int3"), B), ["'int3'", "int2", "int4"]),
}


@pytest.fixture
def ran(monkeypatch) -> list[Any]:
    """What would have run."""
    calls: list[Any] = []
    for op in (expert_linear_op, expert_linear_grad_input):
        monkeypatch.setattr(op, "kernels", [])
        monkeypatch.setattr(op, "reference", lambda *args: calls.append(args))
    return calls


@pytest.mark.parametrize("args, said", BAD.values(), ids=BAD)
def test_what_does_not_fit_together_is_an_error_before_anything_runs(args, said, ran):
    with pytest.raises(ValueError) as caught:
        expert_linear_op(*args)
    assert all(text in str(caught.value) for text in said)
    assert not ran


@pytest.mark.parametrize("wrong", [-1, 3, 2**40, -(2**63)])
def test_an_expert_that_does_not_exist_is_an_error_before_anything_runs(wrong: int, ran):
    ids = torch.tensor([0, 2, wrong, 0])
    for op in (expert_linear, expert_linear_op, expert_linear_op.in_graph):
        with pytest.raises(IndexError, match=rf"expert {wrong} does not exist: the weight has 3 of them, 0 to 2"):
            op(X, ids, W, B)
    with pytest.raises(IndexError, match=rf"expert {wrong} does not exist"):
        expert_linear_grad_input(torch.randn(4, 5), ids, W)
    assert not ran


def test_without_experts_there_are_only_results_without_rows():
    none = (W.rows(slice(0, 0)), None)
    assert expert_linear(X[:0], IDS_4[:0], *none).shape == (0, 5)
    with pytest.raises(IndexError, match="expert 2 does not exist: the weight has 0 of them, none"):
        expert_linear(X, IDS_4, *none)


def test_a_gradient_of_another_width_is_an_error(ran):
    with pytest.raises(ValueError, match=r"the gradient has shape \(4, 6\), but the experts have 5 rows"):
        expert_linear_grad_input(torch.randn(4, 6), IDS_4, W)
    assert not ran


# ---------------------------------------------------------------------------------------------------- torch looks on


@every_kind
def test_vmap_over_rows_and_over_ids(kind: Kind):
    weights, experts = Experts(kind), torch.tensor(IDS["few"])
    x = torch.randn(3, 7, 144)
    run = lambda x, e: expert_linear(*weights.linear(x, e))  # noqa: E731
    made = torch.func.vmap(run, in_dims=(0, None))(x, experts)
    for one, part in zip(x, made, strict=True):
        weights.check(part.contiguous(), one, experts)
    ids = torch.stack([experts, experts.flip(0)])
    made = torch.func.vmap(run, in_dims=(None, 0))(x[0], ids)
    for one, part in zip(ids, made, strict=True):
        weights.check(part.contiguous(), x[0], one)


@every_kind
def test_gradients_and_tangents_of_torch_func(kind: Kind):
    weights, experts = Experts(kind), torch.tensor(IDS["few"])
    x, direction, dense = torch.randn(7, 144), torch.randn(7, 144), weights.dense()[experts].float()
    run = lambda x: expert_linear(*weights.linear(x, experts))  # noqa: E731
    torch.testing.assert_close(torch.func.grad(lambda x: run(x).sum())(x), dense.sum(1), rtol=1e-4, atol=1e-4)
    tangent = torch.einsum("mk,mnk->mn", direction, dense)
    torch.testing.assert_close(torch.func.jvp(run, (x,), (direction,))[1], tangent, rtol=1e-4, atol=1e-4)
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(run(forward_ad.make_dual(x, direction)))
    torch.testing.assert_close(out.tangent, tangent, rtol=1e-4, atol=1e-4)


def test_a_row_that_is_not_finite_spoils_no_other_gradient():
    # the reference, which transforms follow, multiplies every row with every expert
    weights, experts = Experts(KINDS[0]), torch.tensor(IDS["few"])
    x = torch.randn(7, 144)
    x[1] = torch.inf
    weights.scale[3] = torch.inf
    gradient = torch.func.grad(lambda x: expert_linear(*weights.linear(x, experts))[experts != 3].sum())(x)
    assert gradient[experts != 3].isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_follows_other_ids():
    weights, experts = Experts(KINDS[1]), torch.tensor(IDS["few"])
    x, other = torch.randn(7, 144), torch.tensor([1, 1, 4, 2, 0, 4, 4])
    run = lambda x, e: expert_linear(*weights.linear(x, e))  # noqa: E731
    for traced in (torch.jit.trace(run, (x, experts), check_trace=False), make_fx(run)(x, experts)):
        torch.testing.assert_close(traced(x, other), run(x, other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
def test_a_compiled_graph_is_one_for_all_numbers_of_rows_and_has_gradients(kind: Kind):
    weights, counter = Experts(kind), CompileCounterWithBackend("aot_eager")
    run = lambda x, e: expert_linear(*weights.linear(x, e))  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    for ids in (IDS["few"], IDS["many"], IDS["each"]):
        x, experts = torch.randn(len(ids), 144, requires_grad=True), torch.tensor(ids)
        made = compiled(x, experts)
        assert torch.equal(made, run(x, experts))
        (grad,) = torch.autograd.grad(made.sum(), x)
        (expected,) = torch.autograd.grad(run(x, experts).sum(), x)
        assert torch.equal(grad, expected)
    assert counter.frame_count == 1


@every_float
def test_fake_and_meta_tensors_have_the_shape_of_the_result(dtype: torch.dtype):
    args, mode = (X.to(dtype), IDS_4, W, B.to(dtype)), FakeTensorMode()

    def moved(change: Any) -> list[Any]:
        return [change(a) if isinstance(a, torch.Tensor) else a.map(change) for a in args]

    fake, meta = moved(mode.from_tensor), moved(lambda tensor: tensor.to("meta"))
    with mode:
        inside = expert_linear(*fake)
    for made in (inside, expert_linear(*fake), expert_linear(*meta)):
        assert (tuple(made.shape), made.dtype) == ((4, 5), dtype)
