"""A linear call with everything looked up in advance: 4 us of Python per layer in place of 30.

A quantized layer calls the same weight again and again. The checks of the weight, the choice of the kernel and the
reading of its tensors happen once; a call then looks at x, and whether the weight is still where it was.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from quanto_hf.ops.activation import check_scale
from quanto_hf.ops.cpu.call import FLOAT_TYPES, linear_name, scale_argument, weight_arguments
from quanto_hf.ops.cpu.int8 import refuses_int8, why_int8_wrong
from quanto_hf.ops.cpu.library import NATIVE
from quanto_hf.ops.cpu.selfcheck import GEMV_ROWS, why_wrong
from quanto_hf.ops.dequantize import check_weight
from quanto_hf.ops.registry import reference_only
from quanto_hf.ops.watched import watched

BoundLinear = Callable[[torch.Tensor, torch.Tensor | None], "torch.Tensor | None"]


def bind(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    qtype: str,
    group_size: int,
    in_features: int,
    activations: str | None = None,
    x_scale: torch.Tensor | None = None,
) -> BoundLinear | None:
    """``call(x, bias)`` for one weight, or None where there is no native kernel for it.

    The call answers None when it cannot serve: x is not what it was made for (another device, a gradient to follow, a
    view that is not contiguous), or the weight has moved. Who called then takes the general way.

    Args:
        packed: codes of ``qtype``, shape (rows, bytes per row).
        scale: shape (rows, groups).
        zero: None or the shape of ``scale``.
        qtype: the name of a number type.
        group_size: columns that share a scale, -1 for all.
        in_features: columns.
        activations: None, or the number type to which x is rounded first (``ops/activation.py``);
            :func:`refuses_int8` says what there are kernels for.
        x_scale: the scale of all of x, one float32 number, which is read at each call; None: scales are found from x.

    Raises:
        ValueError: the tensors are not those of such a weight, or ``x_scale`` is not one float32 number, or is given
            without activations.
    """
    check_weight(packed, scale, zero, qtype, group_size, in_features)
    if x_scale is not None:
        check_scale(x_scale)
        if activations is None:
            raise ValueError("x_scale is the scale of rounded activations, and activations=None rounds none; name both")
    if not may_bind(packed, scale, zero, x_scale):
        return None
    assert NATIVE is not None
    if activations is not None and refuses_int8(qtype, group_size, zero is not None, in_features, activations):
        return None
    level, asymmetric, scale_dtype = NATIVE.level(), zero is not None, scale.dtype
    weight = weight_arguments(packed, scale, zero, qtype, group_size, in_features)
    rows, bias_shape = packed.shape[0], packed.shape[:1]
    unmoved = whereabouts(packed, scale, zero)
    x_scale_arguments = scale_argument(activations, x_scale)
    trusted: set[tuple[torch.dtype, bool]] = set()
    run, why = getattr(NATIVE, linear_name(qtype, activations)), why_wrong if activations is None else why_int8_wrong
    threads, types = torch.get_num_threads, FLOAT_TYPES

    def call(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        if (
            type(x) is not torch.Tensor
            or not x.is_cpu
            or not x.is_contiguous()
            or watched()
            or (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
            or not unmoved()
            or (x_scale is not None and ((x_scale.data_ptr(),) != x_scale_arguments or not x_scale.numel()))
        ):
            return None
        shape, dtype = x.shape, x.dtype
        kind = types.get(dtype)
        if kind is None or not shape or shape[-1] != in_features or x.is_neg():
            return None
        if bias is not None and (bias.dtype is not dtype or bias.shape != bias_shape or not is_plain(bias)):
            return None
        count = x.numel() // in_features
        if not count:
            return None
        key = (dtype, count > GEMV_ROWS)
        if key not in trusted:
            if why(level, qtype, group_size, asymmetric, scale_dtype, *key):
                return None
            trusted.add(key)
        # not torch.empty, which looks at the default device
        out = x.new_empty((*shape[:-1], rows))
        bias_at = 0 if bias is None else bias.data_ptr()
        run(*weight, x.data_ptr(), bias_at, out.data_ptr(), count, kind, threads(), *x_scale_arguments)
        return out

    return call


def may_bind(*stored: torch.Tensor | None) -> bool:
    """Whether there are native kernels to call, which can read these tensors, None aside, as they lie."""
    if reference_only() or NATIVE is None or watched():
        return False
    return all(tensor is None or (tensor.numel() > 0 and is_plain(tensor)) for tensor in stored)


def whereabouts(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> Callable[[], bool]:
    """A function that says whether these tensors still are the memory that they are now. Another tensor may come behind
    the same Parameter: ``param.data = ...``, as offload does.

    Parameters that tell this themselves, by another ``place`` (``quanto_hf.nn.stored``), are asked for it first: every
    other attribute takes torch 0.1 us to read of a tensor whose type is neither Tensor nor Parameter.
    """
    unmoved = _as_they_are(packed, scale, zero)
    tells = all(tensor is None or hasattr(tensor, "place") for tensor in (packed, scale, zero))
    return _in_place(packed, scale, zero, unmoved) if tells else unmoved


def _as_they_are(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> Callable[[], bool]:
    """:func:`whereabouts`, all of it looked at."""
    packed_at, packed_shape, packed_dtype = packed.data_ptr(), packed.shape, packed.dtype
    scale_at, scale_shape, scale_dtype = scale.data_ptr(), scale.shape, scale.dtype
    zero_at, zero_shape, zero_dtype = (0, None, None) if zero is None else (zero.data_ptr(), zero.shape, zero.dtype)

    def unmoved() -> bool:
        return (
            packed.data_ptr() == packed_at
            and scale.data_ptr() == scale_at
            and packed.shape == packed_shape
            and scale.shape == scale_shape
            and packed.dtype is packed_dtype
            and scale.dtype is scale_dtype
            and packed.is_contiguous()
            and scale.is_contiguous()
            and (
                zero is None
                or (
                    zero.data_ptr() == zero_at
                    and zero.shape == zero_shape
                    and zero.dtype is zero_dtype
                    and zero.is_contiguous()
                )
            )
        )

    return unmoved


def _in_place(packed: Any, scale: Any, zero: Any, unmoved: Callable[[], bool]) -> Callable[[], bool]:
    """:func:`whereabouts` of tensors that have a ``place``: ``unmoved`` only where one has changed. The memory behind
    the same place may still move as a whole (share_memory, storages that are resized)."""
    packed_at, packed_place = packed.data_ptr(), packed.place
    scale_at, scale_place = scale.data_ptr(), scale.place
    zero_at, zero_place = (0, None) if zero is None else (zero.data_ptr(), zero.place)

    def same() -> bool:
        nonlocal packed_place, scale_place, zero_place
        try:
            if (
                packed.place is packed_place
                and scale.place is scale_place
                and packed.data_ptr() == packed_at
                and scale.data_ptr() == scale_at
                and (zero is None or (zero.place is zero_place and zero.data_ptr() == zero_at))
            ):
                return True
            if not unmoved():
                return False
            # moved back
            packed_place, scale_place, zero_place = packed.place, scale.place, None if zero is None else zero.place
            return True
        except AttributeError:
            # torch has swapped one for another type of tensor
            return unmoved()

    return same


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether C++ can read it as it lies."""
    return _has_memory(type(tensor)) and tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg()


@cache
def _has_memory(kind: type[torch.Tensor]) -> bool:
    """Whether tensors of a type are memory of their own, and nothing else: those of :mod:`quanto_hf.nn.stored` are."""
    return kind in (torch.Tensor, torch.nn.Parameter) or hasattr(kind, "place")
