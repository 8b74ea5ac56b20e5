"""The ops ``linear`` and ``linear_grad_input``: a float input times a quantized weight, and the gradient to the input.

Their kernels in plain torch are in ``torch_kernels.py``, the native ones in ``cpu/kernels.py``.
"""

from typing import Any

import torch
import torch.nn.functional as F

from quanto_hf.ops.dequantize import FLOATS, check_weight, dequantize, sample_weights
from quanto_hf.ops.registry import Op
from quanto_hf.ops.watched import sizes, transformed, wants_grad


def _check(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    qtype: str,
    group_size: int,
) -> None:
    if x.dim() == 0 or x.dtype not in FLOATS:
        raise ValueError(
            f"a quantized linear takes float32, bfloat16 or float16 of at least 1 dimension, "
            f"but the input has shape {tuple(x.shape)} and dtype {x.dtype}"
        )
    check_weight(packed, scale, zero, qtype, group_size, x.shape[-1])
    for name, tensor in (("input", x), ("bias", bias)):
        # torch would say so too, but not for every kernel before memory is read
        if tensor is not None and tensor.device != packed.device:
            raise ValueError(f"the {name} is on {tensor.device}, but the weight is on {packed.device}; move one")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != packed.shape[0] or bias.dtype != x.dtype):
        raise ValueError(
            f"the bias has shape {tuple(bias.shape)} and dtype {bias.dtype}, "
            f"but the output has {packed.shape[0]} features of {x.dtype}"
        )


def _reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    qtype: str,
    group_size: int,
) -> torch.Tensor:
    weight = dequantize.reference(packed, scale, zero, qtype, group_size, sizes(x)[-1], x.dtype)
    return F.linear(x, weight, bias)


def _fake(x: Any, packed: Any, scale: Any, zero: Any, bias: Any, qtype: str, group_size: int) -> Any:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _samples(seed: int) -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(seed)
    cases: list[tuple[Any, ...]] = []
    for packed, scale, zero, qtype, group_size, columns in sample_weights(seed):
        for shape in ((columns,), (0, columns), (3, columns), (2, 9, columns)):
            x = torch.randn(shape, generator=generator, dtype=torch.float32)
            bias = torch.randn(packed.shape[0], generator=generator, dtype=torch.float32) if len(shape) == 2 else None
            cases.append((x, packed, scale, zero, bias, qtype, group_size))
    return cases


linear_op = Op(
    name="linear",
    schema="(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? bias, str qtype, int group_size) -> Tensor",
    check=_check,
    reference=_reference,
    fake=_fake,
    samples=_samples,
)


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    qtype: str,
    group_size: int,
) -> torch.Tensor:
    """``x @ weight.T + bias`` for a quantized weight, with gradients to ``x`` and ``bias``.

    Args:
        x: float32, bfloat16 or float16, shape (..., in_features).
        packed: codes of ``qtype``, shape (out_features, bytes per row).
        scale: shape (out_features, groups).
        zero: None or the shape of ``scale``.
        bias: None, or shape (out_features,) in the dtype of ``x``.
        qtype: the name of a number type.
        group_size: columns that share a scale, -1 for all.

    Returns:
        Shape (..., out_features), in the dtype of ``x``.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    if torch.compiler.is_compiling() or (wants_grad(x, bias) and not transformed()):
        out: torch.Tensor = linear_op.torch_op(x, packed, scale, zero, bias, qtype, group_size)
        return out
    return linear_op(x, packed, scale, zero, bias, qtype, group_size)


# ---------------------------------------------------------------------------------------------------- gradient


def _grad_check(grad: Any, packed: Any, scale: Any, zero: Any, qtype: str, group_size: int, in_features: int) -> None:
    check_weight(packed, scale, zero, qtype, group_size, in_features)
    if grad.shape[-1] != packed.shape[0]:
        raise ValueError(f"the gradient has {grad.shape[-1]} features, but the weight has {packed.shape[0]} rows")


def _grad_reference(
    grad: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    qtype: str,
    group_size: int,
    in_features: int,
) -> torch.Tensor:
    return grad @ dequantize.reference(packed, scale, zero, qtype, group_size, in_features, grad.dtype)


def _grad_fake(grad: Any, packed: Any, scale: Any, zero: Any, qtype: str, group_size: int, in_features: int) -> Any:
    return grad.new_empty((*grad.shape[:-1], in_features))


def _grad_samples(seed: int) -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn((2, 3, packed.shape[0]), generator=generator, dtype=torch.float32),
            packed,
            scale,
            zero,
            qtype,
            group_size,
            columns,
        )
        for packed, scale, zero, qtype, group_size, columns in sample_weights(seed)
    ]


linear_grad_input = Op(
    name="linear_grad_input",
    schema="(Tensor grad, Tensor packed, Tensor scale, Tensor? zero, str qtype, int group_size, int in_features) "
    "-> Tensor",
    check=_grad_check,
    reference=_grad_reference,
    fake=_grad_fake,
    samples=_grad_samples,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, packed, scale, zero, bias, ctx.qtype, ctx.group_size = inputs
    ctx.in_features, ctx.has_bias = x.shape[-1], bias is not None
    # the packed weight, never a float one: a training step keeps its memory
    ctx.save_for_backward(packed, scale, zero)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    packed, scale, zero = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = linear_grad_input.torch_op(
            grad.contiguous(), packed, scale, zero, ctx.qtype, ctx.group_size, ctx.in_features
        )
    if ctx.has_bias and ctx.needs_input_grad[4]:
        # sum(()) would sum everything, for an input of 1 dimension
        grad_bias = grad.sum_to_size(grad.shape[-1])
    return grad_x, None, None, None, grad_bias, None, None


linear_op.backward(_backward, _setup_context)
