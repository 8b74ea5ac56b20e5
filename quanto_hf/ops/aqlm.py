"""The ops of additive quantization: ``aqlm_dequantize``, ``aqlm_linear`` and its gradient to the input.

A weight of O rows and I columns is cut into blocks of ``out_group`` x ``in_group`` values. Each block is the sum of one
entry of each codebook, times the scale of its rows:

    W[o, i] = scales[o // out_group] * sum over k of codebooks[k, codes[o // out_group, i // in_group, k]]

Codes are signed integers that are read modulo the size of the codebook, so that any bits are codes. The method is that
of Egiazarian et al., "Extreme Compression of Large Language Models via Additive Quantization", 2024,
https://arxiv.org/abs/2401.06118. Kernels in plain torch are in ``torch_aqlm.py``, native ones in ``cpu/aqlm.py``.
"""

from typing import Any

import torch
import torch.nn.functional as F

from quanto_hf.ops.dequantize import FLOATS
from quanto_hf.ops.registry import Op
from quanto_hf.ops.watched import sizes, transformed, wants_grad

# More entries than the largest published codebooks have, and few enough that all numbers of entries fit in 32 bits.
MAX_BITS = 24


def code_dtype(nbits: int) -> torch.dtype:
    """The smallest signed integer type that holds codes of so many bits."""
    return torch.int8 if nbits <= 8 else torch.int16 if nbits <= 16 else torch.int32


def check_aqlm(codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor) -> None:
    """Raise ValueError unless the three tensors are those of a weight; the text names the one that is wrong.

    Args:
        codes: signed integers, shape (O // out_group, I // in_group, K); int8 for up to 8 bits, then int16, then int32.
        codebooks: float32, bfloat16 or float16, shape (K, 2**nbits, out_group, in_group).
        scales: the same dtypes, shape (O // out_group, 1, 1, 1).
    """
    if codebooks.dim() != 4 or not codebooks.numel() or codebooks.dtype not in FLOATS:
        raise ValueError(
            "codebooks have shape (number of codebooks, 2**nbits, out_group, in_group), none of them 0, and a float "
            f"dtype, but these have shape {tuple(codebooks.shape)} and dtype {codebooks.dtype}"
        )
    count, size = codebooks.shape[:2]
    nbits = int(size).bit_length() - 1
    if size != 1 << nbits or not 1 <= nbits <= MAX_BITS:
        raise ValueError(f"codebooks have 2 to 2**{MAX_BITS} entries, a power of 2, but these have {size}")
    wanted = code_dtype(nbits)
    if codes.dim() != 3 or codes.shape[2] != count or codes.dtype != wanted:
        raise ValueError(
            f"codes for {count} codebooks of {nbits} bits have shape (row groups, column groups, {count}) and dtype "
            f"{wanted}, but these have shape {tuple(codes.shape)} and dtype {codes.dtype}"
        )
    if tuple(scales.shape) != (codes.shape[0], 1, 1, 1) or scales.dtype not in FLOATS:
        raise ValueError(
            f"scales of {codes.shape[0]} row groups have shape ({codes.shape[0]}, 1, 1, 1) and a float dtype, but "
            f"these have shape {tuple(scales.shape)} and dtype {scales.dtype}"
        )
    for name, tensor in (("codebooks", codebooks), ("scales", scales)):
        if tensor.device != codes.device:
            raise ValueError(f"the {name} are on {tensor.device}, but the codes are on {codes.device}; move one")


def features(codes: torch.Tensor, codebooks: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of the weight."""
    return codes.shape[0] * codebooks.shape[2], codes.shape[1] * codebooks.shape[3]


# ----------------------------------------------------------------------------------------------------- dequantize


def _dequantize_check(codes: Any, codebooks: Any, scales: Any, dtype: Any) -> None:
    check_aqlm(codes, codebooks, scales)
    if dtype not in FLOATS:
        raise ValueError(f"cannot dequantize to {dtype}; choose one of {', '.join(map(str, FLOATS))}")


def _dequantize_reference(
    codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return decode_lines(codes, codebooks, scales).flatten(0, 1).to(dtype)


def decode_lines(codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The definition: rows of the weight as float32, shape (..., out_group, I), of codes of shape (..., I // in_group,
    K) and scales of shape (..., 1, 1, 1)."""
    count, size, *_ = sizes(codebooks)
    index = codes.long() & (size - 1)
    blocks = codebooks[0].float()[index.select(-1, 0)]
    for k in range(1, count):
        blocks = blocks + codebooks[k].float()[index.select(-1, k)]
    return (blocks * scales.float()).transpose(-3, -2).flatten(-2)


def recorded_rows(
    index: torch.Tensor, codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """Rows of the weight as float32, shape (*index.shape, I), in torch's own operators and for an index of any number
    of dimensions: what a trace can record."""
    out_group, (_, *block) = sizes(codebooks)[2], sizes(codes)
    rows = index.to(torch.int64)
    lines = rows.div(out_group, rounding_mode="floor")
    # not an index, which counts negative numbers from the end
    found = F.embedding(lines, codes.flatten(1)).unflatten(-1, block)
    made = decode_lines(found, codebooks, F.embedding(lines, scales.flatten(1)).unflatten(-1, (1, 1, 1)))
    return made.take_along_dim((rows % out_group).unsqueeze(-1).unsqueeze(-1), -2).squeeze(-2)


def _dequantize_fake(codes: Any, codebooks: Any, scales: Any, dtype: Any) -> Any:
    return codebooks.new_empty(features(codes, codebooks), dtype=dtype)


# Row groups, column groups, codebooks, bits, out_group, in_group: the published layouts in small, and what hurts: one
# row, few bits, widths of no vector, several rows in a group.
SAMPLE_LAYOUTS = (
    (5, 12, 2, 8, 1, 8),
    (1, 9, 1, 8, 1, 8),
    (7, 3, 1, 16, 1, 16),
    (3, 70, 1, 16, 1, 8),
    (2, 5, 8, 8, 8, 8),
    (9, 4, 3, 5, 2, 3),
    (4, 2, 1, 12, 1, 40),
    (3, 2, 2, 17, 1, 4),
)


def sample_aqlm(seed: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(codes, codebooks, scales) with random values, for tests; some codes have bits above those that count."""
    generator = torch.Generator().manual_seed(seed)
    cases = []
    for i, (rows, columns, count, nbits, out_group, in_group) in enumerate(SAMPLE_LAYOUTS):
        dtype = code_dtype(nbits)
        info = torch.iinfo(dtype)
        codes = torch.randint(
            info.min, info.max + 1, (rows, columns, count), generator=generator, dtype=torch.int64
        ).to(dtype)
        # a table of 2**17 entries need not be normal to be wrong
        codebooks = torch.rand((count, 1 << nbits, out_group, in_group), generator=generator, dtype=torch.float32) - 0.5
        scales = torch.rand((rows, 1, 1, 1), generator=generator, dtype=torch.float32) + 0.5
        cases.append((codes, codebooks.to(FLOATS[i % 3]), scales.to(FLOATS[i % 3])))
    return cases


def _dequantize_samples(seed: int) -> list[tuple[Any, ...]]:
    return [(*weight, dtype) for weight in sample_aqlm(seed) for dtype in FLOATS]


aqlm_dequantize_op = Op(
    name="aqlm_dequantize",
    schema="(Tensor codes, Tensor codebooks, Tensor scales, ScalarType dtype) -> Tensor",
    check=_dequantize_check,
    reference=_dequantize_reference,
    fake=_dequantize_fake,
    samples=_dequantize_samples,
)


def aqlm_dequantize(
    codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The float weight of additive codes: sums in float32, in the order of the codebooks, then times the scale.

    Args:
        codes: signed integers, shape (O // out_group, I // in_group, K).
        codebooks: shape (K, 2**nbits, out_group, in_group).
        scales: shape (O // out_group, 1, 1, 1).
        dtype: of the result: float32, bfloat16 or float16.

    Returns:
        Shape (O, I).

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.

    Example:
        >>> books = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
        >>> codes, scales = torch.tensor([[[0], [-1]]], dtype=torch.int8), torch.full((1, 1, 1, 1), 2.0)
        >>> aqlm_dequantize(codes, books, scales, torch.float32)
        tensor([[2., 4., 6., 8.]])
    """
    op = aqlm_dequantize_op.torch_op if torch.compiler.is_compiling() else aqlm_dequantize_op
    weight: torch.Tensor = op(codes, codebooks, scales, dtype)
    return weight


# ---------------------------------------------------------------------------------------------------------- linear


def _linear_check(x: Any, codes: Any, codebooks: Any, scales: Any, bias: Any) -> None:
    check_aqlm(codes, codebooks, scales)
    rows, columns = features(codes, codebooks)
    if x.dim() == 0 or x.dtype not in FLOATS or x.shape[-1] != columns:
        raise ValueError(
            f"this AQLM weight takes float32, bfloat16 or float16 of shape (..., {columns}), "
            f"but the input has shape {tuple(x.shape)} and dtype {x.dtype}"
        )
    for name, tensor in (("input", x), ("bias", bias)):
        if tensor is not None and tensor.device != codes.device:
            raise ValueError(f"the {name} is on {tensor.device}, but the codes are on {codes.device}; move one")
    if bias is not None and (tuple(bias.shape) != (rows,) or bias.dtype != x.dtype):
        raise ValueError(
            f"the bias has shape {tuple(bias.shape)} and dtype {bias.dtype}, but the output has {rows} features of "
            f"{x.dtype}"
        )


def _linear_reference(
    x: torch.Tensor, codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return F.linear(x, _dequantize_reference(codes, codebooks, scales, x.dtype), bias)


def _linear_fake(x: Any, codes: Any, codebooks: Any, scales: Any, bias: Any) -> Any:
    return x.new_empty((*x.shape[:-1], features(codes, codebooks)[0]))


def _linear_samples(seed: int) -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(seed)
    cases: list[tuple[Any, ...]] = []
    for weight in sample_aqlm(seed):
        rows, columns = features(*weight[:2])
        for shape in ((columns,), (0, columns), (3, columns), (2, 9, columns)):
            x = torch.randn(shape, generator=generator, dtype=torch.float32)
            cases.append(
                (x, *weight, torch.randn(rows, generator=generator, dtype=torch.float32) if len(shape) == 2 else None)
            )
    return cases


aqlm_linear_op = Op(
    name="aqlm_linear",
    schema="(Tensor x, Tensor codes, Tensor codebooks, Tensor scales, Tensor? bias) -> Tensor",
    check=_linear_check,
    reference=_linear_reference,
    fake=_linear_fake,
    samples=_linear_samples,
)


def aqlm_linear(
    x: torch.Tensor, codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``x @ weight.T + bias`` for a weight of additive codes, with gradients to ``x`` and ``bias``.

    Args:
        x: float32, bfloat16 or float16, shape (..., I).
        codes: signed integers, shape (O // out_group, I // in_group, K).
        codebooks: shape (K, 2**nbits, out_group, in_group).
        scales: shape (O // out_group, 1, 1, 1).
        bias: None, or shape (O,) in the dtype of ``x``.

    Returns:
        Shape (..., O), in the dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    if torch.compiler.is_compiling() or (wants_grad(x, bias) and not transformed()):
        out: torch.Tensor = aqlm_linear_op.torch_op(x, codes, codebooks, scales, bias)
        return out
    return aqlm_linear_op(x, codes, codebooks, scales, bias)


# -------------------------------------------------------------------------------------------------------- gradient


def _grad_check(grad: Any, codes: Any, codebooks: Any, scales: Any) -> None:
    check_aqlm(codes, codebooks, scales)
    rows = features(codes, codebooks)[0]
    if grad.shape[-1] != rows:
        raise ValueError(f"the gradient has {grad.shape[-1]} features, but the weight has {rows} rows")


def _grad_reference(
    grad: torch.Tensor, codes: torch.Tensor, codebooks: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    return grad @ _dequantize_reference(codes, codebooks, scales, grad.dtype)


def _grad_fake(grad: Any, codes: Any, codebooks: Any, scales: Any) -> Any:
    return grad.new_empty((*grad.shape[:-1], features(codes, codebooks)[1]))


def _grad_samples(seed: int) -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn((2, 3, features(*weight[:2])[0]), generator=generator, dtype=torch.float32), *weight)
        for weight in sample_aqlm(seed)
    ]


aqlm_linear_grad_input = Op(
    name="aqlm_linear_grad_input",
    schema="(Tensor grad, Tensor codes, Tensor codebooks, Tensor scales) -> Tensor",
    check=_grad_check,
    reference=_grad_reference,
    fake=_grad_fake,
    samples=_grad_samples,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, codes, codebooks, scales, bias = inputs
    ctx.has_bias = bias is not None
    # the codes, never a float weight: a training step keeps its memory
    ctx.save_for_backward(codes, codebooks, scales)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = aqlm_linear_grad_input.torch_op(grad.contiguous(), *ctx.saved_tensors)
    if ctx.has_bias and ctx.needs_input_grad[4]:
        grad_bias = grad.sum_to_size(grad.shape[-1])
    return grad_x, None, None, None, grad_bias


aqlm_linear_op.backward(_backward, _setup_context)
