"""The ops ``expert_linear`` and ``expert_linear_grad_input``: each row of a float input times the quantized weight of
its own expert, as the layers of a mixture of experts compute it, and the gradient to the input.

Their kernels in plain torch are in ``torch_experts.py``, the native one in ``cpu/experts.py``.
"""

from typing import Any

import torch
import torch.nn.functional as F

from quanto_hf.ops.dequantize import FLOATS, check_weight, dequantize, sample_weights
from quanto_hf.ops.index import check_index
from quanto_hf.ops.registry import Op
from quanto_hf.ops.watched import dispatched, sizes, transformed, wants_grad

LEAD = ("experts", "rows")


def check_experts(rows: torch.Tensor, experts: torch.Tensor, packed: torch.Tensor) -> None:
    """Raise ValueError unless ``experts`` has a number for each row, and IndexError unless all of them exist."""
    if experts.dtype is not torch.int64 or experts.shape != rows.shape[:1]:
        raise ValueError(
            f"the experts of {rows.shape[0]} rows have shape ({rows.shape[0]},) and dtype torch.int64, "
            f"but these have shape {tuple(experts.shape)} and dtype {experts.dtype}"
        )
    if experts.device != packed.device:
        raise ValueError(f"the expert ids are on {experts.device}, but the weight is on {packed.device}; move one")
    check_index(experts, packed.shape[0], "expert", "the weight")


def _check(
    x: torch.Tensor,
    experts: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    qtype: str,
    group_size: int,
) -> None:
    if x.dim() != 2 or x.dtype not in FLOATS:
        raise ValueError(
            f"experts take float32, bfloat16 or float16 of shape (rows, in_features), "
            f"but the input has shape {tuple(x.shape)} and dtype {x.dtype}"
        )
    check_weight(packed, scale, zero, qtype, group_size, x.shape[-1], LEAD)
    for name, tensor in (("input", x), ("bias", bias)):
        if tensor is not None and tensor.device != packed.device:
            raise ValueError(f"the {name} is on {tensor.device}, but the weight is on {packed.device}; move one")
    if bias is not None and (bias.shape != packed.shape[:2] or bias.dtype != x.dtype):
        raise ValueError(
            f"the bias of {packed.shape[0]} experts with {packed.shape[1]} features has shape "
            f"{tuple(packed.shape[:2])} and dtype {x.dtype}, but this one has shape {tuple(bias.shape)} and dtype "
            f"{bias.dtype}"
        )
    check_experts(x, experts, packed)


def _only(mine: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The rows of one expert, zeros in place of the others: what they hold, NaN too, must not reach its gradients."""
    return torch.where(mine, values, torch.zeros((), dtype=values.dtype, device=values.device))


def _reference(
    x: torch.Tensor,
    experts: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    qtype: str,
    group_size: int,
) -> torch.Tensor:
    """Every expert multiplies every row, and each row takes the product of its own. No operator of it depends on what
    the ids are: this is what transforms and traces follow."""
    count, features, _ = sizes(packed)
    out = x.new_zeros((x.shape[0], features))
    for e in range(count):
        weight = dequantize.reference(
            packed[e], scale[e], None if zero is None else zero[e], qtype, group_size, sizes(x)[1], x.dtype
        )
        mine = (experts == e)[:, None]
        out = torch.where(mine, F.linear(_only(mine, x), weight, None if bias is None else bias[e]), out)
    return out


def _fake(x: Any, experts: Any, packed: Any, scale: Any, zero: Any, bias: Any, qtype: str, group_size: int) -> Any:
    return x.new_empty((x.shape[0], packed.shape[1]))


# Rows of x, and whether ids are sorted: none, one, fewer than experts, more than the kernels for few rows take.
SAMPLE_ROWS = ((0, False), (1, False), (3, False), (23, False), (23, True))


def _sample_experts(seed: int) -> list[tuple[Any, ...]]:
    """(x, experts, packed, scale, zero, qtype, group_size, in_features) with three copies of each sample weight."""
    generator = torch.Generator().manual_seed(seed)
    cases: list[tuple[Any, ...]] = []
    for packed, scale, zero, *rest in sample_weights(seed):
        # expert 1 has the weight backwards, so that it matters which one is taken
        weight = [None if t is None else torch.stack([t, t.flip(0), t]) for t in (packed, scale, zero)]
        for rows, is_sorted in SAMPLE_ROWS:
            experts = torch.randint(0, 3, (rows,), generator=generator, dtype=torch.int64)
            experts = experts.sort().values if is_sorted else experts
            cases.append(
                (torch.randn((rows, rest[-1]), generator=generator, dtype=torch.float32), experts, *weight, *rest)
            )
    return cases


def _samples(seed: int) -> list[tuple[Any, ...]]:
    cases: list[tuple[Any, ...]] = []
    for x, experts, packed, scale, zero, qtype, group_size, _ in _sample_experts(seed):
        bias = (
            torch.linspace(-1, 1, packed.shape[0] * packed.shape[1], dtype=torch.float32).view(packed.shape[:2])
            if len(x) % 2
            else None
        )
        cases.append((x, experts, packed, scale, zero, bias, qtype, group_size))
    return cases


expert_linear_op = Op(
    name="expert_linear",
    schema="(Tensor x, Tensor experts, Tensor packed, Tensor scale, Tensor? zero, Tensor? bias, str qtype, "
    "int group_size) -> Tensor",
    check=_check,
    reference=_reference,
    fake=_fake,
    samples=_samples,
)


def expert_linear(
    x: torch.Tensor,
    experts: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    qtype: str,
    group_size: int,
) -> torch.Tensor:
    """``x[i] @ weight[experts[i]].T + bias[experts[i]]`` for each row i, with gradients to ``x`` and ``bias``.

    Rows may come in any order; where those of an expert lie side by side (sorted ids), nothing is copied. An expert
    without rows costs nothing.

    Args:
        x: float32, bfloat16 or float16, shape (rows, in_features).
        experts: int64, shape (rows,).
        packed: codes of ``qtype``, shape (experts, out_features, bytes per row).
        scale: shape (experts, out_features, groups).
        zero: None or the shape of ``scale``.
        bias: None, or shape (experts, out_features) in the dtype of ``x``.
        qtype: the name of a number type.
        group_size: columns that share a scale, -1 for all.

    Returns:
        Shape (rows, out_features), in the dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        IndexError: there is no such expert.
    """
    args = (x, experts, packed, scale, zero, bias, qtype, group_size)
    if torch.compiler.is_compiling() or (not transformed() and (_is_unreal(experts) or wants_grad(x, bias))):
        out: torch.Tensor = expert_linear_op.torch_op(*args)
        return out
    return expert_linear_op(*args)


def _is_unreal(experts: torch.Tensor) -> bool:
    """Whether there may be no ids to read, or a mode wants to see one operator and not what it does for these ids."""
    return dispatched() or experts.is_meta or type(experts) is not torch.Tensor


# ---------------------------------------------------------------------------------------------------- gradient


def _grad_check(
    grad: Any, experts: Any, packed: Any, scale: Any, zero: Any, qtype: str, group_size: int, in_features: int
) -> None:
    check_weight(packed, scale, zero, qtype, group_size, in_features, LEAD)
    if grad.dim() != 2 or grad.shape[1] != packed.shape[1]:
        raise ValueError(f"the gradient has shape {tuple(grad.shape)}, but the experts have {packed.shape[1]} rows")
    check_experts(grad, experts, packed)


def _grad_reference(
    grad: torch.Tensor,
    experts: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    qtype: str,
    group_size: int,
    in_features: int,
) -> torch.Tensor:
    out = grad.new_zeros((grad.shape[0], in_features))
    for e in range(packed.shape[0]):
        weight = dequantize.reference(
            packed[e], scale[e], None if zero is None else zero[e], qtype, group_size, in_features, grad.dtype
        )
        mine = (experts == e)[:, None]
        out = torch.where(mine, _only(mine, grad) @ weight, out)
    return out


def _grad_fake(
    grad: Any, experts: Any, packed: Any, scale: Any, zero: Any, qtype: str, group_size: int, in_features: int
) -> Any:
    return grad.new_empty((grad.shape[0], in_features))


def _grad_samples(seed: int) -> list[tuple[Any, ...]]:
    return [(x.new_ones((len(x), packed.shape[1])).cumsum(0) / (len(x) + 1), experts, packed, *rest)
            for x, experts, packed, *rest in _sample_experts(seed)]  # fmt: skip


expert_linear_grad_input = Op(
    name="expert_linear_grad_input",
    schema="(Tensor grad, Tensor experts, Tensor packed, Tensor scale, Tensor? zero, str qtype, int group_size, "
    "int in_features) -> Tensor",
    check=_grad_check,
    reference=_grad_reference,
    fake=_grad_fake,
    samples=_grad_samples,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, experts, packed, scale, zero, bias, ctx.qtype, ctx.group_size = inputs
    ctx.in_features, ctx.has_bias = x.shape[1], bias is not None
    # the packed weights, never float ones
    ctx.save_for_backward(experts, packed, scale, zero)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    experts, packed, scale, zero = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = expert_linear_grad_input.torch_op(
            grad.contiguous(), experts, packed, scale, zero, ctx.qtype, ctx.group_size, ctx.in_features
        )
    if ctx.has_bias and ctx.needs_input_grad[5]:
        # in float32, as the sum over the rows of a linear layer is
        total = torch.zeros(packed.shape[:2], dtype=torch.float32, device=grad.device)
        grad_bias = total.index_add(0, experts, grad.float()).to(grad.dtype)
    return grad_x, None, None, None, None, grad_bias, None, None


expert_linear_op.backward(_backward, _setup_context)
