"""The op ``dequantize``: a quantized weight to a float one."""

from collections.abc import Callable, Hashable
from typing import Any

import torch

from quanto_hf.ops.grouped_weight import FLOATS
from quanto_hf.ops.registry import Op
from quanto_hf.ops.selfcheck import WEIGHT_TOLERANCE, largest
from quanto_hf.ops.weight import KINDS, Weight, samples


def check_dtype(dtype: Any) -> None:
    """Raise ValueError unless a weight can be dequantized to this dtype."""
    if dtype not in FLOATS:
        raise ValueError(f"cannot dequantize to {dtype}; choose one of {', '.join(map(str, FLOATS))}")


def _check(weight: Weight, dtype: Any) -> None:
    weight.check()
    check_dtype(dtype)


def _fake(weight: Weight, dtype: Any) -> Any:
    return weight.stored[1].new_empty(weight.shape, dtype=dtype)  # type: ignore[union-attr]


def _errors(run: Callable[..., torch.Tensor], key: Any) -> list[tuple[float, float]]:
    """Over the largest weight."""
    weight = key[0].random(key)
    exact = weight.dense(torch.float32)
    return [(largest((run(weight, torch.float32) - exact).abs()) / float(exact.abs().max()), WEIGHT_TOLERANCE)]


def weight_title(key: Any, *rest: Hashable) -> str:
    """A kind of call in words: that of its weights."""
    return f"kernel for {key[0].title(key)}"


dequantize_op = Op(
    name="dequantize",
    schema="(Weight weight, ScalarType dtype) -> Tensor",
    check=_check,
    reference=lambda weight, dtype: weight.dense(dtype),
    fake=_fake,
    samples=lambda seed: [(weight, dtype) for weight in samples() for dtype in FLOATS],
    case=lambda weight, dtype: (weight.key,),
    errors=_errors,
    title=weight_title,
    kinds=KINDS,
)


def dequantize(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """The float weight.

    Args:
        weight: with any dimensions in front of the rows.
        dtype: float32, bfloat16 or float16.

    Returns:
        The shape of the weight.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.

    Example:
        >>> from quanto_hf.ops import GroupedWeight
        >>> codes, scale = torch.tensor([[2, -1]], dtype=torch.int8), torch.tensor([[0.5]])
        >>> dequantize(GroupedWeight(codes, scale, None, "int8", -1, 2), torch.bfloat16)
        tensor([[ 1.0000, -0.5000]], dtype=torch.bfloat16)
    """
    shape = weight.shape
    flat = weight.map(lambda tensor: tensor.reshape(-1, tensor.shape[-1])) if len(shape) > 2 else weight
    run = dequantize_op.in_graph if torch.compiler.is_compiling() else dequantize_op
    made: torch.Tensor = run(flat, dtype)
    return made.view(shape)
