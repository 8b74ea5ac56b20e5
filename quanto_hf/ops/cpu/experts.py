"""Registers the native kernel of ``expert_linear`` (csrc/experts.cpp)."""

from typing import Any

import torch

from quanto_hf.ops.cpu.call import native_expert_linear
from quanto_hf.ops.cpu.kernels import on_cpu, optional, plain, refuses_weight
from quanto_hf.ops.cpu.library import NATIVE
from quanto_hf.ops.cpu.selfcheck import GEMV_ROWS, why_experts_wrong
from quanto_hf.ops.expert_linear import expert_linear_op


def refuses_experts(
    x: Any, experts: Any, packed: Any, scale: Any, zero: Any, bias: Any, qtype: str, group_size: int
) -> str | None:
    """Why the native kernel does not take these arguments, or None."""
    if not x.numel() or not packed.numel():
        return "there is nothing to multiply"
    if not on_cpu(x, experts, bias):
        return "it runs on CPU only"
    # a copy would be one of all experts
    if not all(t is None or (t.is_contiguous() and not t.is_neg()) for t in (packed, scale, zero)):
        return "the weights of the experts do not lie in memory one after another"
    # how many rows an expert has is not known yet: all kinds of kernels may run
    for many in (False, True) if x.shape[0] > GEMV_ROWS else (False,):
        said = refuses_weight(packed, scale, zero, qtype, group_size, x.dtype, many)
        if said is not None:
            return said
    assert NATIVE is not None
    return why_experts_wrong(NATIVE.level())


@expert_linear_op.kernel("native", refuses_experts)
def _expert_linear(
    x: torch.Tensor,
    experts: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    qtype: str,
    group_size: int,
) -> torch.Tensor:
    """Rows are counted and put in order in C++; then the level's ``linear``, expert by expert."""
    return native_expert_linear(plain(x), plain(experts), packed, scale, zero, optional(bias), qtype, group_size)
