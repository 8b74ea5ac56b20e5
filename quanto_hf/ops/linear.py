"""The ops ``linear`` and ``linear_grad_input``: a float input times a quantized weight, and the gradient to the input.

Their kernels are in ``torch/blocks.py`` and ``cpu/products.py``.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from quanto_hf.ops.dequantize import weight_title
from quanto_hf.ops.grouped_weight import FLOATS, check_devices
from quanto_hf.ops.registry import Op
from quanto_hf.ops.selfcheck import FEW, FEW_ROWS, MANY, TOLERANCE, off
from quanto_hf.ops.watched import transformed, wants_grad
from quanto_hf.ops.weight import Weight, samples


def check_operands(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> None:
    """Raise ValueError unless x, a weight of 2 dimensions and a bias can be multiplied and added."""
    if x.dim() == 0 or x.dtype not in FLOATS:
        raise ValueError(
            f"a quantized linear takes float32, bfloat16 or float16 of at least 1 dimension, "
            f"but the input has shape {tuple(x.shape)} and dtype {x.dtype}"
        )
    weight.check()
    rows, columns = weight.shape
    if x.shape[-1] != columns:
        raise ValueError(f"this weight takes inputs of shape (..., {columns}), but the input has {tuple(x.shape)}")
    # torch would say so too, but not for every kernel before memory is read
    check_devices(weight.device, "weight is", {"input is": x, "bias is": bias})
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != rows or bias.dtype != x.dtype):
        raise ValueError(
            f"the bias has shape {tuple(bias.shape)} and dtype {bias.dtype}, "
            f"but the output has {rows} features of {x.dtype}"
        )


def _samples(seed: int) -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(seed)
    cases: list[tuple[Any, ...]] = []
    for weight in samples():
        rows, columns = weight.shape
        for shape in ((columns,), (0, columns), (3, columns), (2, 9, columns)):
            x = torch.randn(shape, generator=generator, dtype=torch.float32)
            bias = torch.randn(rows, generator=generator, dtype=torch.float32) if len(shape) == 2 else None
            cases.append((x, weight, bias))
    return cases


def is_many(x: torch.Tensor) -> bool:
    """Whether x has more rows than the kernels for few rows take."""
    return x.numel() > FEW_ROWS * x.shape[-1]


def inputs(columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Random rows for self-checks."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(MANY[-1], columns, generator=generator, dtype=torch.float32).to(dtype)


def _errors(run: Callable[..., torch.Tensor], key: Any, dtype: torch.dtype, many: bool) -> list[tuple[float, float]]:
    """Over |x| @ |weight| + |bias|."""
    weight = key[0].random(key)
    dense, worst = weight.dense(torch.float32), 0.0
    bias = torch.ones(len(dense), dtype=dtype)
    for rows in MANY if many else FEW:
        x = inputs(dense.shape[1], dtype)[:rows]
        worst = max(worst, off(run(x, weight, bias), x, dense, x.float() @ dense.T + 1, 1.0))
    return [(worst, TOLERANCE[dtype])]


linear_op = Op(
    name="linear",
    schema="(Tensor x, Weight weight, Tensor? bias) -> Tensor",
    check=check_operands,
    reference=lambda x, weight, bias: F.linear(x, weight.dense(x.dtype), bias),
    fake=lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
    samples=_samples,
    case=lambda x, weight, bias: (weight.key, x.dtype, is_many(x)),
    errors=_errors,
    title=weight_title,
)


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias`` for a quantized weight, with gradients to ``x`` and ``bias``.

    Args:
        x: float32, bfloat16 or float16, shape (..., in_features).
        weight: of 2 dimensions.
        bias: None, or shape (out_features,) in the dtype of ``x``.

    Returns:
        Shape (..., out_features), in the dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    seen = torch.compiler.is_compiling() or (wants_grad(x, bias) and not transformed())
    made: torch.Tensor = linear_op.in_graph(x, weight, bias) if seen else linear_op(x, weight, bias)
    return made


# ---------------------------------------------------------------------------------------------------- gradient


def _grad_check(grad: torch.Tensor, weight: Weight) -> None:
    weight.check()
    if grad.shape[-1] != weight.shape[0]:
        raise ValueError(f"the gradient has {grad.shape[-1]} features, but the weight has {weight.shape[0]} rows")
    check_devices(weight.device, "weight is", {"gradient is": grad})


def _grad_samples(seed: int) -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn((2, 3, weight.shape[0]), generator=generator, dtype=torch.float32), weight) for weight in samples()
    ]


def _grad_errors(run: Callable[..., torch.Tensor], key: Any) -> list[tuple[float, float]]:
    """Over |grad| @ |weight|, in float32: in 16 bits each block of rows is rounded, as often as there are blocks."""
    weight = key[0].random(key)
    dense = weight.dense(torch.float32)
    grad = inputs(len(dense), torch.float32)[:3]
    return [(off(run(grad, weight), grad, dense.T, grad @ dense), TOLERANCE[torch.float32])]


linear_grad_input = Op(
    name="linear_grad_input",
    schema="(Tensor grad, Weight weight) -> Tensor",
    check=_grad_check,
    reference=lambda grad, weight: grad @ weight.dense(grad.dtype),
    fake=lambda grad, weight: grad.new_empty((*grad.shape[:-1], weight.shape[1])),
    samples=_grad_samples,
    case=lambda grad, weight: (weight.key,),
    errors=_grad_errors,
    title=weight_title,
)


def _backward(needs: list[bool], weight: Weight, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_x = linear_grad_input.in_graph(grad.contiguous(), weight) if needs[0] else None
    # sum(()) would sum everything, for an input of 1 dimension
    return grad_x, None, grad.sum_to_size(grad.shape[-1]) if needs[2] else None


linear_op.backward(_backward, lambda x, weight, bias: ())
