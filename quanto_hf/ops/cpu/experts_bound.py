"""A product with the weights of experts with everything looked up in advance, as ``bound.py`` has it."""

from collections.abc import Callable

import torch

from quanto_hf.ops.cpu.bound import is_plain, may_bind, whereabouts
from quanto_hf.ops.cpu.call import FLOAT_TYPES, weight_arguments
from quanto_hf.ops.cpu.experts import refuses_experts
from quanto_hf.ops.cpu.library import NATIVE
from quanto_hf.ops.cpu.selfcheck import GEMV_ROWS
from quanto_hf.ops.dequantize import check_weight
from quanto_hf.ops.expert_linear import LEAD
from quanto_hf.ops.watched import watched

BoundExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], "torch.Tensor | None"]


def bind_experts(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    qtype: str,
    group_size: int,
    in_features: int,
) -> BoundExperts | None:
    """``call(x, experts, bias)`` for the weights of some experts, or None where there is no native kernel for them.

    The call gives what :func:`quanto_hf.ops.expert_linear` gives, to the bit. It answers None when it cannot serve: x,
    ids or bias are not what it was made for (another device, a gradient to follow, a view that is not contiguous, an
    expert that does not exist), or the weights have moved. Who called then takes the general way.

    Args:
        packed: codes of ``qtype``, shape (experts, out_features, bytes per row).
        scale: shape (experts, out_features, groups).
        zero: None or the shape of ``scale``.
        qtype: the name of a number type.
        group_size: columns that share a scale, -1 for all.
        in_features: columns.

    Raises:
        ValueError: the tensors are not those of such weights.
    """
    check_weight(packed, scale, zero, qtype, group_size, in_features, LEAD)
    if not may_bind(packed, scale, zero):
        return None
    assert NATIVE is not None
    weight = weight_arguments(packed, scale, zero, qtype, group_size, in_features)
    count, rows = packed.shape[:2]
    bias_shape, unmoved = packed.shape[:2], whereabouts(packed, scale, zero)
    trusted: set[tuple[torch.dtype, bool]] = set()
    run, threads, types = NATIVE.expert_linear, torch.get_num_threads, FLOAT_TYPES

    def call(x: torch.Tensor, experts: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        if (
            type(x) is not torch.Tensor
            or type(experts) is not torch.Tensor
            or not x.is_cpu
            or not x.is_contiguous()
            or watched()
            or (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
            or not unmoved()
        ):
            return None
        shape, dtype = x.shape, x.dtype
        kind = types.get(dtype)
        if kind is None or len(shape) != 2 or shape[1] != in_features or x.is_neg():
            return None
        m = shape[0]
        if (
            not m
            or experts.dtype is not torch.int64
            or experts.shape != (m,)
            or not experts.is_cpu
            or not experts.is_contiguous()
            or experts.is_neg()
        ):
            return None
        if bias is not None and (bias.dtype is not dtype or bias.shape != bias_shape or not is_plain(bias)):
            return None
        key = (dtype, m > GEMV_ROWS)
        if key not in trusted:
            if refuses_experts(x, experts, packed, scale, zero, bias, qtype, group_size):
                return None
            trusted.add(key)
        # not torch.empty, which looks at the default device
        out = x.new_empty((m, rows))
        bias_at = 0 if bias is None else bias.data_ptr()
        # ids are looked at before anything else is read; the general way names the one that does not exist
        found = run(*weight, x.data_ptr(), bias_at, out.data_ptr(), m, kind, threads(), experts.data_ptr(), count)
        return out if found else None

    return call
