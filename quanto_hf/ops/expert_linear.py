"""The ops ``expert_linear`` and ``expert_linear_grad_input``: each row of a float input times the quantized weight of
its own expert, as the layers of a mixture of experts compute it, and the gradient to the input.

Their kernels in plain torch are in ``torch/experts.py``, the native one in ``cpu/rows.py``.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F

from quanto_hf.ops.grouped_weight import FLOATS, check_devices, sample_weights
from quanto_hf.ops.index import check_index
from quanto_hf.ops.registry import Op
from quanto_hf.ops.selfcheck import FEW_ROWS, TOLERANCE, off
from quanto_hf.ops.watched import dispatched, sizes, transformed, wants_grad
from quanto_hf.ops.weight import GroupedWeight

LEAD = ("experts", "rows")
KINDS = (GroupedWeight,)


def _check_ids(rows: torch.Tensor, experts: torch.Tensor, weight: GroupedWeight) -> None:
    """Raise ValueError unless ``experts`` has a number for each row, and IndexError unless all of them exist."""
    if experts.dtype is not torch.int64 or experts.shape != rows.shape[:1]:
        raise ValueError(
            f"the experts of {rows.shape[0]} rows have shape ({rows.shape[0]},) and dtype torch.int64, "
            f"but these have shape {tuple(experts.shape)} and dtype {experts.dtype}"
        )
    check_devices(weight.device, "weight is", {"expert ids are": experts})
    check_index(experts, weight.shape[0], "expert", "the weight")


def _check(x: torch.Tensor, experts: torch.Tensor, weight: GroupedWeight, bias: torch.Tensor | None) -> None:
    if x.dim() != 2 or x.dtype not in FLOATS:
        raise ValueError(
            f"experts take float32, bfloat16 or float16 of shape (rows, in_features), "
            f"but the input has shape {tuple(x.shape)} and dtype {x.dtype}"
        )
    weight.check(LEAD)
    count, rows, columns = weight.shape
    if x.shape[1] != columns:
        raise ValueError(f"these experts take inputs of shape (rows, {columns}), but the input has {tuple(x.shape)}")
    check_devices(weight.device, "weight is", {"input is": x, "bias is": bias})
    if bias is not None and (tuple(bias.shape) != (count, rows) or bias.dtype != x.dtype):
        raise ValueError(
            f"the bias of {count} experts with {rows} features has shape {(count, rows)} and dtype {x.dtype}, "
            f"but this one has shape {tuple(bias.shape)} and dtype {bias.dtype}"
        )
    _check_ids(x, experts, weight)


def _only(mine: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The rows of one expert, zeros in place of the others: what they hold, NaN too, must not reach its gradients."""
    return torch.where(mine, values, torch.zeros((), dtype=values.dtype, device=values.device))


def _reference(
    x: torch.Tensor, experts: torch.Tensor, weight: GroupedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """Every expert multiplies every row, and each row takes the product of its own. No operator of it depends on what
    the ids are: this is what transforms and traces follow."""
    count, features, _ = sizes(weight.packed)
    out = x.new_zeros((x.shape[0], features))
    for e in range(count):
        mine = (experts == e)[:, None]
        made = F.linear(_only(mine, x), weight.rows(e).dense(x.dtype), None if bias is None else bias[e])
        out = torch.where(mine, made, out)
    return out


# Rows of x, and whether ids are sorted: none, one, fewer than experts, more than the kernels for few rows take.
SAMPLE_ROWS = ((0, False), (1, False), (3, False), (23, False), (23, True))


def _stack(weight: GroupedWeight) -> GroupedWeight:
    """Three experts; expert 1 has the weight backwards, so that it matters which one is taken."""
    return weight.map(lambda tensor: torch.stack([tensor, tensor.flip(0), tensor]))


def _samples(seed: int) -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(seed)
    cases: list[tuple[Any, ...]] = []
    for weight in map(_stack, sample_weights()):
        count, rows, columns = weight.shape
        for number, is_sorted in SAMPLE_ROWS:
            experts = torch.randint(0, 3, (number,), generator=generator, dtype=torch.int64)
            x = torch.randn((number, columns), generator=generator, dtype=torch.float32)
            bias = torch.linspace(-1, 1, count * rows, dtype=torch.float32).view(count, rows) if number % 2 else None
            cases.append((x, experts.sort().values if is_sorted else experts, weight, bias))
    return cases


def _errors(run: Callable[..., torch.Tensor], key: Any, dtype: torch.dtype) -> list[tuple[float, float]]:
    """Over |x| @ |weight| + |bias|, of each row with its own expert: in any order, sorted, and few rows."""
    weight = _stack(key[0].random(key))
    rows = torch.arange(4 * FEW_ROWS, dtype=torch.int64)
    # expert 1 has one row of the few, expert 0 has more than the kernels for few rows take
    mixed = (rows * 7 % len(rows) % 5).clamp(max=2).masked_fill(rows % 5 == 2, 0)
    generator, worst = torch.Generator().manual_seed(0), 0.0
    x = torch.randn(len(rows), weight.shape[2], generator=generator, dtype=torch.float32).to(dtype)
    bias = torch.randn(weight.shape[:2], generator=generator, dtype=torch.float32).to(dtype)
    for experts in (mixed, mixed.sort().values, mixed[:3]):
        made = run(x[: len(experts)], experts, weight, bias)
        for e in experts.unique().tolist():
            mine, dense = experts == e, weight.rows(e).dense(torch.float32)
            part = x[: len(experts)][mine]
            exact = part.float() @ dense.T + bias[e].float()
            worst = max(worst, off(made[mine], part, dense, exact, float(bias.abs().max())))
    return [(worst, TOLERANCE[dtype])]


def _title(*case: Hashable) -> str:
    return "kernel for experts"


expert_linear_op = Op(
    name="expert_linear",
    schema="(Tensor x, Tensor experts, Weight weight, Tensor? bias) -> Tensor",
    check=_check,
    reference=_reference,
    fake=lambda x, experts, weight, bias: x.new_empty((x.shape[0], weight.shape[1])),
    samples=_samples,
    case=lambda x, experts, weight, bias: (weight.key, x.dtype),
    errors=_errors,
    title=_title,
    check_bound=lambda weight: weight.check(LEAD),
    kinds=KINDS,
)


def expert_linear(
    x: torch.Tensor, experts: torch.Tensor, weight: GroupedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``x[i] @ weight[experts[i]].T + bias[experts[i]]`` for each row i, with gradients to ``x`` and ``bias``.

    Rows may come in any order; where those of an expert lie side by side (sorted ids), nothing is copied. An expert
    without rows costs nothing.

    Args:
        x: float32, bfloat16 or float16, shape (rows, in_features).
        experts: int64, shape (rows,).
        weight: shape (experts, out_features, in_features).
        bias: None, or shape (experts, out_features) in the dtype of ``x``.

    Returns:
        Shape (rows, out_features), in the dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        IndexError: there is no such expert.
    """
    seen = torch.compiler.is_compiling() or (not transformed() and (_is_unreal(experts) or wants_grad(x, bias)))
    made: torch.Tensor = (expert_linear_op.in_graph if seen else expert_linear_op)(x, experts, weight, bias)
    return made


def _is_unreal(experts: torch.Tensor) -> bool:
    """Whether there may be no ids to read, or a mode wants to see one operator and not what it does for these ids."""
    return dispatched() or experts.is_meta or type(experts) is not torch.Tensor


# ---------------------------------------------------------------------------------------------------- gradient


def _grad_check(grad: torch.Tensor, experts: torch.Tensor, weight: GroupedWeight) -> None:
    weight.check(LEAD)
    if grad.dim() != 2 or grad.shape[1] != weight.shape[1]:
        raise ValueError(f"the gradient has shape {tuple(grad.shape)}, but the experts have {weight.shape[1]} rows")
    check_devices(weight.device, "weight is", {"gradient is": grad})
    _check_ids(grad, experts, weight)


def _grad_reference(grad: torch.Tensor, experts: torch.Tensor, weight: GroupedWeight) -> torch.Tensor:
    out = grad.new_zeros((grad.shape[0], weight.shape[2]))
    for e in range(weight.shape[0]):
        mine = (experts == e)[:, None]
        out = torch.where(mine, _only(mine, grad) @ weight.rows(e).dense(grad.dtype), out)
    return out


def _grad_samples(seed: int) -> list[tuple[Any, ...]]:
    return [
        (x.new_ones((len(x), weight.shape[1])).cumsum(0) / (len(x) + 1), experts, weight)
        for x, experts, weight, _ in _samples(seed)
    ]


def _grad_errors(run: Callable[..., torch.Tensor], key: Any) -> list[tuple[float, float]]:
    """Over |grad| @ |weight|, in float32."""
    weight, experts = _stack(key[0].random(key)), torch.tensor([1, 0, 1], dtype=torch.int64)
    made, worst = run(grad := torch.ones(3, weight.shape[1], dtype=torch.float32), experts, weight), 0.0
    for row, e in enumerate(experts.tolist()):
        dense = weight.rows(e).dense(torch.float32)
        worst = max(worst, off(made[row : row + 1], grad[:1], dense.T, grad[:1] @ dense))
    return [(worst, TOLERANCE[torch.float32])]


expert_linear_grad_input = Op(
    name="expert_linear_grad_input",
    schema="(Tensor grad, Tensor experts, Weight weight) -> Tensor",
    check=_grad_check,
    reference=_grad_reference,
    fake=lambda grad, experts, weight: grad.new_empty((grad.shape[0], weight.shape[2])),
    samples=_grad_samples,
    case=lambda grad, experts, weight: (weight.key,),
    errors=_grad_errors,
    title=_title,
    kinds=KINDS,
)


def _backward(
    needs: list[bool], weight: GroupedWeight, grad: torch.Tensor, experts: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    grad_x = expert_linear_grad_input.in_graph(grad.contiguous(), experts, weight) if needs[0] else None
    grad_bias = None
    if needs[3]:
        # in float32, as the sum over the rows of a linear layer is
        total = torch.zeros(weight.shape[:2], dtype=torch.float32, device=grad.device)
        grad_bias = total.index_add(0, experts, grad.float()).to(grad.dtype)
    return grad_x, None, None, grad_bias


expert_linear_op.backward(_backward, lambda x, experts, weight, bias: (experts,))
