"""The op ``embedding``: rows of a quantized weight as floats, chosen by integers.

Its kernels in plain torch are in ``torch/rows.py``, the native one in ``cpu/rows.py``.
"""

from collections.abc import Callable
from typing import Any

import torch

from quanto_hf.ops.dequantize import check_dtype, weight_title
from quanto_hf.ops.grouped_weight import FLOATS, check_devices
from quanto_hf.ops.index import check_index
from quanto_hf.ops.registry import Op
from quanto_hf.ops.selfcheck import WEIGHT_TOLERANCE, largest
from quanto_hf.ops.watched import dispatched, transformed
from quanto_hf.ops.weight import Weight, samples

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _check(index: torch.Tensor, weight: Weight, dtype: Any) -> None:
    if index.dtype not in INTEGERS:
        # floats would be cut off
        raise ValueError(f"rows are chosen by integers of 8 to 64 bits, but these have dtype {index.dtype}")
    weight.check()
    check_dtype(dtype)
    check_devices(weight.device, "weight is", {"row numbers are": index})
    check_index(index, weight.shape[0], "row", "the weight")


def _samples(seed: int) -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(seed)
    cases: list[tuple[Any, ...]] = []
    for weight in samples():
        for i, shape in enumerate(((), (0,), (7,), (2, 3))):
            index = torch.randint(0, weight.shape[0], shape, generator=generator, dtype=torch.int64)
            cases.append((index.to(INTEGERS[-1 - i % 2]), weight, FLOATS[i % len(FLOATS)]))
    return cases


def _errors(run: Callable[..., torch.Tensor], key: Any) -> list[tuple[float, float]]:
    """Over the largest weight."""
    weight, index = key[0].random(key), torch.tensor([36, 0, 5, 5], dtype=torch.int64)
    exact = weight.dense(torch.float32)
    made = run(index, weight, torch.float32)
    return [(largest((made - exact[index]).abs()) / float(exact.abs().max()), WEIGHT_TOLERANCE)]


embedding_op = Op(
    name="embedding",
    schema="(Tensor index, Weight weight, ScalarType dtype) -> Tensor",
    check=_check,
    reference=lambda index, weight, dtype: weight.recorded_rows(index).to(dtype),
    fake=lambda index, weight, dtype: weight.stored[1].new_empty((*index.shape, weight.shape[1]), dtype=dtype),
    samples=_samples,
    case=lambda index, weight, dtype: (weight.key,),
    errors=_errors,
    title=weight_title,
)
embedding_op.batched()


def embedding(index: torch.Tensor, weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """``weight[index]`` for a quantized weight, of which no more than these rows is dequantized.

    Args:
        index: integers of 8 to 64 bits, any shape.
        weight: of 2 dimensions.
        dtype: of the result: float32, bfloat16 or float16.

    Returns:
        Shape (*index.shape, in_features).

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        IndexError: there is no such row; negative numbers do not count from the end.
    """
    # there is no gradient that torch.func could miss, and the operator has a rule for vmap
    seen = torch.compiler.is_compiling() or dispatched() or transformed() or type(index) is not torch.Tensor
    made: torch.Tensor = (embedding_op.in_graph if seen else embedding_op)(index, weight, dtype)
    return made
