"""The ops ``linear`` and ``linear_grad_input``: a float input times a quantized weight, and the gradient to the input.

Kernels: ``torch_int8pack`` (torch's own int8 product), ``torch_blocks`` (dequantize a block of rows into a reused
buffer, multiply, next block). Native kernels register themselves before these.
"""

from typing import Any

import torch
import torch.nn.functional as F

from quanto_hf.ops.decode import decode
from quanto_hf.ops.dequantize import FLOATS, block_rows, check_weight, dequantize, dequantize_rows, sample_weights
from quanto_hf.ops.registry import Op
from quanto_hf.ops.scratch import scratch
from quanto_hf.qtypes import QTYPES

# Above this many rows torch's int8 product loses to block copy + matmul (benchmarks/linear.py, 4096 x 4096, bfloat16).
INT8PACK_MAX_ROWS = 8
# It reads whole vectors of 16 columns and checks nothing: 132 columns read behind the end of both tensors, with wrong
# results or a segmentation fault (torch 2.13, AVX-512).
INT8PACK_COLUMNS = 16


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
    weight = dequantize.reference(packed, scale, zero, qtype, group_size, x.shape[-1], x.dtype)
    return F.linear(x, weight, bias)


def _fake(x: Any, packed: Any, scale: Any, zero: Any, bias: Any, qtype: str, group_size: int) -> Any:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _samples(seed: int) -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(seed)
    cases: list[tuple[Any, ...]] = []
    for packed, scale, zero, qtype, group_size, columns in sample_weights(seed):
        for shape in ((columns,), (0, columns), (3, columns), (2, 9, columns)):
            x = torch.randn(shape, generator=generator)
            bias = torch.randn(packed.shape[0], generator=generator) if len(shape) == 2 else None
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
    if torch.compiler.is_compiling() or (
        torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    ):
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
        (torch.randn((2, 3, packed.shape[0]), generator=generator), packed, scale, zero, qtype, group_size, columns)
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


# ---------------------------------------------------------------------------------------------------- kernels


def _int8pack_refuses(x: Any, packed: Any, scale: Any, zero: Any, bias: Any, qtype: str, group_size: int) -> str | None:
    if qtype != "int8" or group_size > 0 or zero is not None:
        return "it multiplies symmetric per-channel int8 weights only"
    if x.dtype is not torch.bfloat16:
        return "torch's int8 product is fast in bfloat16 only"
    if x.device.type != "cpu":
        return "it runs on CPU only"
    if x.shape[-1] % INT8PACK_COLUMNS or not x.numel():
        return f"in_features must be a multiple of {INT8PACK_COLUMNS}, and the input not empty"
    if x.numel() > INT8PACK_MAX_ROWS * x.shape[-1]:
        return f"above {INT8PACK_MAX_ROWS} rows block copy and matmul is faster"
    return None


@linear_op.kernel("torch_int8pack", _int8pack_refuses)
def _linear_int8pack(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    qtype: str,
    group_size: int,
) -> torch.Tensor:
    """torch's own product of bfloat16 and int8. It wants a bfloat16 scale, which would shift whole channels by up to
    0.2 %: ones are given instead, and the float32 scale multiplies the output."""
    ones = scratch("ones", (packed.shape[0],), torch.bfloat16, x.device).fill_(1.0)
    out = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]).contiguous(), packed, ones)
    return _finish(out, scale, bias).view(*x.shape[:-1], packed.shape[0])


def _finish(out: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Channel scale, then bias, in float32; the result in the dtype of ``out``."""
    channel = scale.view(-1)
    result = out * channel if bias is None else torch.addcmul(bias.to(channel.dtype), out.to(channel.dtype), channel)
    return result.to(out.dtype)


def _scales_output(qtype: str, group_size: int, zero: torch.Tensor | None, dtype: torch.dtype) -> bool:
    """Whether one scale per row can multiply the output instead of the weight: one pass over the weight less.

    Not in float16, where codes of up to 57344 times an input overflow.
    """
    return group_size < 0 and zero is None and not QTYPES[qtype].is_packed and dtype is not torch.float16


@linear_op.kernel("torch_blocks", lambda *args: None)
def _linear_blocks(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    qtype: str,
    group_size: int,
) -> torch.Tensor:
    """Dequantize a block of rows into a reused buffer, multiply, go on with the next block."""
    columns, rows = x.shape[-1], packed.shape[0]
    flat = x.reshape(-1, columns)
    out = x.new_empty((flat.shape[0], rows))
    late = _scales_output(qtype, group_size, zero, x.dtype)
    step = block_rows(columns, x.dtype)
    for start in range(0, rows, step):
        cut = slice(start, min(start + step, rows))
        weight = scratch("weight", (cut.stop - start, columns), x.dtype, x.device)
        if late:
            decode(packed[cut], QTYPES[qtype], weight)
        else:
            dequantize_rows(packed[cut], scale[cut], None if zero is None else zero[cut], qtype, group_size, weight)
        out[:, cut] = F.linear(flat, weight, None if late or bias is None else bias[cut])
    return (_finish(out, scale, bias) if late else out).view(*x.shape[:-1], rows)


@linear_grad_input.kernel("torch_blocks", lambda *args: None)
def _grad_blocks(
    grad: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    qtype: str,
    group_size: int,
    in_features: int,
) -> torch.Tensor:
    """The same block by block; the sum over blocks is kept in float32."""
    # not reshape(-1, ...), which is ambiguous for a weight without rows
    flat = grad.reshape(grad.shape[:-1].numel(), grad.shape[-1])
    total = flat.new_zeros((flat.shape[0], in_features), dtype=torch.float32)
    step = block_rows(in_features, grad.dtype)
    for start in range(0, packed.shape[0], step):
        cut = slice(start, min(start + step, packed.shape[0]))
        weight = scratch("weight", (cut.stop - start, in_features), grad.dtype, grad.device)
        dequantize_rows(packed[cut], scale[cut], None if zero is None else zero[cut], qtype, group_size, weight)
        total += flat[:, cut] @ weight
    return total.to(grad.dtype).view(*grad.shape[:-1], in_features)
