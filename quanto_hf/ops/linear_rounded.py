"""The op ``linear_rounded``: x is rounded to int8 or an 8-bit float, and multiplied with a quantized weight.

A kernel may do both in one. Otherwise x is rounded by itself (:mod:`quanto_hf.ops.activation`), and multiplied by the
best kernel of ``linear``.
"""

from collections.abc import Callable
from typing import Any

import torch

from quanto_hf.ops.activation import check_scale, round_activations
from quanto_hf.ops.linear import check_operands, inputs, is_many, linear_op
from quanto_hf.ops.registry import Op
from quanto_hf.ops.selfcheck import FEW, MANY, TOLERANCE, off
from quanto_hf.ops.weight import GroupedWeight, Weight
from quanto_hf.qtypes import QTYPES

Maybe = torch.Tensor | None


def rounded(x: torch.Tensor, weight: Weight, activations: str, x_scale: Maybe) -> torch.Tensor:
    """x as it is multiplied, in its own dtype."""
    kind = QTYPES[activations]
    return round_activations(x, kind, weight.activation_group(kind), x_scale).to(x.dtype)


def _check(x: torch.Tensor, weight: Weight, bias: Maybe, activations: str, x_scale: Maybe) -> None:
    check_operands(x, weight, bias)
    _check_rounding(activations, x_scale)


def _check_bound(weight: Weight, activations: str, x_scale: Maybe) -> None:
    weight.check()
    _check_rounding(activations, x_scale)


def _check_rounding(activations: str, x_scale: Maybe) -> None:
    kind = QTYPES.get(activations)
    if kind is None or kind.is_packed:
        raise ValueError(f"activations are rounded to int8 or an 8-bit float, not to {activations!r}")
    if x_scale is not None:
        check_scale(x_scale)


def _samples(seed: int) -> list[tuple[Any, ...]]:
    scale = torch.tensor(2 / 127, dtype=torch.float32)
    cases = []
    for i, (x, weight, bias) in enumerate(linear_op.samples(seed)):
        cases.append((x, weight, bias, "float8_e4m3fn" if i % 5 == 4 else "int8", scale if i % 3 == 2 else None))
    return cases


def _errors(
    run: Callable[..., torch.Tensor], key: Any, dtype: torch.dtype, many: bool, activations: str
) -> list[tuple[float, float]]:
    """Over |x| @ |weight|, with scales found from x and with a given one."""
    # int8 weights: there is a kernel for rows of a single group only
    single = key[0] is GroupedWeight and key[1] == "int8" and key[2] > 0
    weight = key[0].random(key, 37, key[2]) if single else key[0].random(key)
    dense, worst = weight.dense(torch.float32), 0.0
    x, kind = inputs(dense.shape[1], dtype), QTYPES[activations]
    # 2 / 127 cuts one number in twenty
    for x_scale in (None, torch.tensor(2 / 127, dtype=torch.float32)):
        exact = round_activations(x, kind, weight.activation_group(kind), x_scale) @ dense.T
        for rows in MANY if many else FEW:
            made = run(x[:rows], weight, None, activations, x_scale)
            worst = max(worst, off(made, x[:rows], dense, exact[:rows]))
    return [(worst, TOLERANCE[dtype])]


linear_rounded_op = Op(
    name="linear_rounded",
    schema="(Tensor x, Weight weight, Tensor? bias, str activations, Tensor? x_scale) -> Tensor",
    check=_check,
    reference=lambda x, weight, bias, activations, x_scale: linear_op.reference(
        rounded(x, weight, activations, x_scale), weight, bias
    ),
    fake=lambda x, weight, *rest: x.new_empty((*x.shape[:-1], weight.shape[0])),
    samples=_samples,
    case=lambda x, weight, bias, activations, x_scale: (weight.key, x.dtype, is_many(x), activations),
    errors=_errors,
    title=lambda key, dtype, many, activations: f"kernel for {key[0].title(key)} and {activations} activations",
    check_bound=_check_bound,
)


def linear_rounded(
    x: torch.Tensor, weight: Weight, bias: Maybe, activations: str, x_scale: Maybe = None
) -> torch.Tensor:
    """``round(x) @ weight.T + bias``, without gradients.

    Args:
        x: float32, bfloat16 or float16, shape (..., in_features).
        weight: of 2 dimensions.
        bias: None, or shape (out_features,) in the dtype of ``x``.
        activations: the number type to which x is rounded, int8 or an 8-bit float.
        x_scale: the scale of all of x, one float32 number; None: scales are found from x, for as many columns as
            :func:`quanto_hf.ops.activation_group` says.

    Returns:
        Shape (..., out_features), in the dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    run = linear_rounded_op.in_graph if torch.compiler.is_compiling() else linear_rounded_op
    made: torch.Tensor = run(x, weight, bias, activations, x_scale)
    return made
