"""Kernels of the experts' ops in plain torch: one expert after another with the kernels of ``linear``, which hold no
more than a block of a float weight."""

from collections.abc import Iterator
from typing import Any

import torch

from quanto_hf.ops.expert_linear import expert_linear_grad_input, expert_linear_op
from quanto_hf.ops.grouped_weight import GroupedWeight
from quanto_hf.ops.index import check_index
from quanto_hf.ops.linear import linear_grad_input, linear_op
from quanto_hf.ops.watched import watched


def _reads_ids(rows: Any, experts: Any, *rest: Any) -> str | None:
    if watched() or experts.is_meta:
        return "it looks at the ids of the experts, which a mode, a transform or a trace must not depend on"
    return None


def used_experts(experts: torch.Tensor, count: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Each expert that has rows, and their numbers."""
    order = torch.argsort(experts, stable=True)
    counts = torch.bincount(experts, minlength=count).tolist()
    if len(counts) > count:  # on a device whose ids nobody has looked at yet
        check_index(experts.cpu(), count, "expert", "the weight")
    begin = 0
    for expert, rows in enumerate(counts):
        if rows:
            yield expert, order[begin : begin + rows]
        begin += rows


@expert_linear_op.kernel("each_expert", _reads_ids)
def _each_expert(
    x: torch.Tensor, experts: torch.Tensor, weight: GroupedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """The rows of an expert are gathered, multiplied by the best kernel of ``linear``, and scattered."""
    out = x.new_empty((x.shape[0], weight.shape[1]))
    for e, rows in used_experts(experts, weight.shape[0]):
        args = (x[rows], weight.rows(e), None if bias is None else bias[e])
        out[rows] = linear_op.choose(*args)(*args)
    return out


@expert_linear_grad_input.kernel("each_expert", _reads_ids)
def _each_expert_grad(grad: torch.Tensor, experts: torch.Tensor, weight: GroupedWeight) -> torch.Tensor:
    """The same with the kernels of ``linear_grad_input``."""
    out = grad.new_empty((grad.shape[0], weight.shape[2]))
    for e, rows in used_experts(experts, weight.shape[0]):
        args = (grad[rows], weight.rows(e))
        out[rows] = linear_grad_input.choose(*args)(*args)
    return out
