"""The op ``embedding``: rows of a quantized weight as floats, chosen by integers.

Its kernel in plain torch is in ``torch_kernels.py``, the native one in ``cpu/embedding.py``.
"""

from typing import Any

import torch
import torch.nn.functional as F

from quanto_hf.ops.dequantize import FLOATS, check_weight, dequantize, sample_weights
from quanto_hf.ops.index import check_index
from quanto_hf.ops.registry import Op
from quanto_hf.ops.watched import dispatched, transformed

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_row_numbers(index: torch.Tensor) -> None:
    """Raise ValueError unless rows are chosen by integers: floats would be cut off."""
    if index.dtype not in INTEGERS:
        raise ValueError(f"rows are chosen by integers of 8 to 64 bits, but these have dtype {index.dtype}")


def _check(
    index: Any, packed: Any, scale: Any, zero: Any, qtype: str, group_size: int, in_features: int, dtype: Any
) -> None:
    check_row_numbers(index)
    check_weight(packed, scale, zero, qtype, group_size, in_features)
    if dtype not in FLOATS:
        raise ValueError(f"cannot dequantize to {dtype}; choose one of {', '.join(map(str, FLOATS))}")
    if index.device != packed.device:
        raise ValueError(f"the row numbers are on {index.device}, but the weight is on {packed.device}; move one")
    check_index(index, packed.shape[0], "row", "the weight")


def _reference(
    index: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    qtype: str,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    # No shape is looked at, so that a trace serves an index of any number of dimensions; torch's own embedding takes no
    # negative numbers, which indexing would count from the end.
    rows = index.to(torch.int64)
    picked = [None if tensor is None else F.embedding(rows, tensor) for tensor in (packed, scale, zero)]
    return dequantize.reference(*picked, qtype, group_size, in_features, dtype)


def _fake(
    index: Any, packed: Any, scale: Any, zero: Any, qtype: str, group_size: int, in_features: int, dtype: Any
) -> Any:
    return scale.new_empty((*index.shape, in_features), dtype=dtype)


def _samples(seed: int) -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(seed)
    cases: list[tuple[Any, ...]] = []
    for packed, *rest in sample_weights(seed):
        for i, shape in enumerate(((), (0,), (7,), (2, 3))):
            index = torch.randint(0, packed.shape[0], shape, generator=generator, dtype=torch.int64).to(
                INTEGERS[-1 - i % 2]
            )
            cases.append((index, packed, *rest, FLOATS[i % len(FLOATS)]))
    return cases


embedding_op = Op(
    name="embedding",
    schema="(Tensor index, Tensor packed, Tensor scale, Tensor? zero, str qtype, int group_size, int in_features, "
    "ScalarType dtype) -> Tensor",
    check=_check,
    reference=_reference,
    fake=_fake,
    samples=_samples,
)


def _batched(info: Any, dims: tuple[int | None, ...], index: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, int]:
    """A batch of index tensors is one more dimension of them; weights that are batched themselves take turns."""
    if dims[0] is not None and not any(dim is not None for dim in dims[1:]):
        return embedding_op.torch_op(index.movedim(dims[0], 0), *rest), 0
    args = (index, *rest)
    made = []
    for i in range(info.batch_size):
        one = [a if dim is None else a.select(dim, i) for a, dim in zip(args, dims, strict=True)]
        made.append(embedding_op.torch_op(*one))
    return torch.stack(made), 0


embedding_op.batched(_batched)


def embedding(
    index: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    qtype: str,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``weight[index]`` for a quantized weight, of which no more than these rows is dequantized.

    Args:
        index: integers of 8 to 64 bits, any shape.
        packed: codes of ``qtype``, shape (rows, bytes per row).
        scale: shape (rows, groups).
        zero: None or the shape of ``scale``.
        qtype: the name of a number type.
        group_size: columns that share a scale, -1 for all.
        in_features: columns.
        dtype: of the result: float32, bfloat16 or float16.

    Returns:
        Shape (*index.shape, in_features).

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        IndexError: there is no such row; negative numbers do not count from the end.
    """
    args = (index, packed, scale, zero, qtype, group_size, in_features, dtype)
    # there is no gradient that torch.func could miss, and the operator has a rule for vmap
    seen = torch.compiler.is_compiling() or dispatched() or transformed() or type(index) is not torch.Tensor
    made: torch.Tensor = embedding_op.torch_op(*args) if seen else embedding_op(*args)
    return made
