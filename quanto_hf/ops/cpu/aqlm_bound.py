"""A product with AQLM weights with everything looked up in advance, as ``bound.py`` has it: 30 us less per layer."""

import torch

from quanto_hf.ops.aqlm import check_aqlm, features
from quanto_hf.ops.cpu.aqlm import aqlm_arguments, refuses_aqlm
from quanto_hf.ops.cpu.bound import BoundLinear, is_plain, may_bind, whereabouts
from quanto_hf.ops.cpu.call import FLOAT_TYPES
from quanto_hf.ops.cpu.library import NATIVE
from quanto_hf.ops.cpu.selfcheck import GEMV_ROWS
from quanto_hf.ops.watched import watched


def bind_aqlm(codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor) -> BoundLinear | None:
    """``call(x, bias)`` for one weight, or None where there is no native kernel for it.

    The call answers None when it cannot serve: x is not what it was made for (another device, a gradient to follow, a
    view that is not contiguous), or the weight has moved. Who called then takes the general way.

    Args:
        codes: as of :func:`quanto_hf.ops.aqlm_linear`.
        codebooks: as of :func:`quanto_hf.ops.aqlm_linear`.
        scales: as of :func:`quanto_hf.ops.aqlm_linear`.

    Raises:
        ValueError: the tensors are not those of such a weight.
    """
    check_aqlm(codes, codebooks, scales)
    stored = (codes, codebooks, scales)
    if not may_bind(*stored):
        return None
    assert NATIVE is not None
    weight, run, types, threads = aqlm_arguments(*stored), NATIVE.aqlm_linear, FLOAT_TYPES, torch.get_num_threads
    rows, columns = features(codes, codebooks)
    unmoved = whereabouts(*stored)
    trusted: set[tuple[torch.dtype, bool]] = set()

    def call(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        if (
            type(x) is not torch.Tensor
            or not x.is_cpu
            or not x.is_contiguous()
            or watched()
            or (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
            or not unmoved()
        ):
            return None
        shape, dtype = x.shape, x.dtype
        kind = types.get(dtype)
        if kind is None or not shape or shape[-1] != columns or x.is_neg():
            return None
        if bias is not None and (bias.dtype is not dtype or tuple(bias.shape) != (rows,) or not is_plain(bias)):
            return None
        count = x.numel() // columns
        if not count:
            return None
        key = (dtype, count > GEMV_ROWS)
        if key not in trusted:
            if refuses_aqlm(*stored, *key):
                return None
            trusted.add(key)
        # not torch.empty, which looks at the default device
        out = x.new_empty((*shape[:-1], rows))
        run(*weight, x.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr(), count, kind, threads())
        return out

    return call
