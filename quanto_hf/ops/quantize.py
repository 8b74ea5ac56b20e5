"""The op ``quantize``: a float weight to the stored tensors of a :class:`GroupedWeight`, with scales that a fit finds.

The definition runs the fit in torch on blocks of rows. A kernel may know fits itself, by number.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from quanto_hf.ops.grouped_weight import GroupedWeight, check_devices, cuts, groups
from quanto_hf.ops.packing import pack, packed_width
from quanto_hf.ops.registry import Op
from quanto_hf.ops.scratch import scratch
from quanto_hf.qtypes import QTYPES

# Values that are fitted at a time. The float32 temporaries of a fit (about 4 of this size) stay in a 1 MB L2 cache
# at 64 k values, but then the calls cost more than the work: 256 k is the fastest of 64 k to 4 M for int4 and int2.
BLOCK_VALUES = 1 << 18
# Largest relative increase of the total error over the definition that is accepted from a kernel: searches break ties
# differently, which moves the error by less than 0.1 % (tests/ops/cpu/test_quantize.py).
MORE_ERROR = 0.02
NOT_FINITE = "the weight has NaN or infinite values, which cannot be quantized"


@dataclass(frozen=True)
class NativeFit:
    """A fit, and the grid that it serves, in the words of csrc/common.h.

    Args:
        kind: "range", "mse" or "hqq".
        numbers: lowest and highest number of the grid, then those of the fit.
        table: None or 129 float32, as csrc/grid.h describes them.
    """

    kind: str
    numbers: tuple[float, ...]
    table: torch.Tensor | None = None


@dataclass(frozen=True)
class Recipe:
    """How scales and codes are found.

    Args:
        title: names the weights and the fit in a warning.
        key: what decides about the result; recipes with the same key are the same.
        find: ``find(values)`` returns scale and zero (or None) for each row of float32 values, rounded as they are
            stored.
        encode: ``encode(values, codes)`` writes the codes of values in units of the scale into ``codes``.
        native: the fit as kernels know it, or None.
    """

    title: str
    key: Hashable
    find: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = field(compare=False)
    encode: Callable[..., Any] = field(compare=False)
    native: NativeFit | None = field(default=None, compare=False)


def empty_weight(shape: tuple[int, int], qtype: str, group_size: int, asymmetric: bool, scale_dtype: Any) -> Any:
    """A :class:`GroupedWeight` of zeros, to be filled."""
    rows, columns = shape
    kind = QTYPES[qtype]
    packed = torch.zeros(rows, packed_width(columns, kind.bits), dtype=kind.storage)
    scale = torch.zeros(rows, groups(columns, group_size), dtype=scale_dtype)
    return GroupedWeight(packed, scale, scale.clone() if asymmetric else None, qtype, group_size, columns)


def _check(rows: torch.Tensor, out: GroupedWeight, recipe: Recipe) -> None:
    out.check()
    check_devices(out.device, "codes are", {"rows are": rows})
    if tuple(rows.shape) != out.shape or not rows.is_floating_point():
        raise ValueError(f"a weight of shape {out.shape} and a float dtype is wanted, not {rows.dtype} {rows.shape}")


def _reference(rows: torch.Tensor, out: GroupedWeight, recipe: Recipe) -> GroupedWeight:
    """Blocks of rows, through reused buffers.

    Raises:
        ValueError: the weight has NaN or infinite values.
    """
    step = max(1, BLOCK_VALUES // rows.shape[1])
    # under autocast the products of a fit would be rounded to 16 bits
    with torch.autocast(rows.device.type, enabled=False):
        for start in range(0, rows.shape[0], step):
            cut = slice(start, start + step)
            _quantize_block(rows[cut], out.rows(cut), recipe)
    return out


def _quantize_block(rows: torch.Tensor, out: GroupedWeight, recipe: Recipe) -> None:
    """Quantize a block of rows into views of the result."""
    n, columns = rows.shape
    values = scratch("values", (n, columns), torch.float32, rows.device).copy_(rows)
    codes = out.packed
    if out.type.is_packed:
        codes = scratch("codes", (n, columns), torch.uint8, rows.device)
    for cut, which in cuts(columns, out.group_size):
        # (rows * groups, columns of a group): what shares a scale is a row
        part = values[:, cut].unflatten(1, (which.stop - which.start, -1))
        width = part.shape[-1]
        scale, zero = recipe.find(part.reshape(-1, width))
        if not torch.isfinite(scale).all():
            raise ValueError(NOT_FINITE)
        out.scale[:, which] = scale.view(n, -1)
        u = scratch("scaled", tuple(part.shape), torch.float32, rows.device)
        torch.div(part, scale.view(n, -1, 1), out=u)
        if zero is not None:
            assert out.zero is not None
            out.zero[:, which] = zero.view(n, -1)
            u += zero.view(n, -1, 1)
        recipe.encode(u, codes[:, cut].unflatten(1, (which.stop - which.start, -1)))
    if out.type.is_packed:
        out.packed.copy_(pack(codes, out.type.bits))


def _errors(run: Callable[..., Any], recipe: Recipe, key: Any, dtype: torch.dtype) -> list[tuple[float, float]]:
    """How much larger the error of the whole weight is than that of the definition."""
    _, qtype, group_size, asymmetric, scale_dtype = key
    # two whole groups and a short one, or a row of odd width
    shape = (5, 2 * max(group_size, 128) + 77)
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(dtype)
    made, exact = (empty_weight(shape, qtype, group_size, asymmetric, scale_dtype) for _ in range(2))
    # the definition of the numbers, not the native reading of them
    errors = [float((of(rows, out, recipe).dense(torch.float32) - rows.float()).norm())
              for of, out in ((run, made), (_reference, exact))]  # fmt: skip
    return [(errors[0] / errors[1] - 1, MORE_ERROR)]


def _samples(seed: int) -> list[tuple[Any, ...]]:
    """int8 with the largest magnitude as the fit."""

    def find(values: torch.Tensor) -> tuple[torch.Tensor, None]:
        return (values.abs().amax(1) / 127).clamp(min=1e-30), None

    def encode(values: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return codes.copy_(values.round_().clamp_(-127, 127))

    recipe = Recipe("int8 weights", "sample", find, encode, NativeFit("range", (-127.0, 127.0)))
    generator = torch.Generator().manual_seed(seed)
    cases: list[tuple[Any, ...]] = []
    for group_size, shape in ((32, (5, 96)), (64, (1, 200)), (-1, (17, 7))):
        rows = torch.randn(shape, generator=generator, dtype=torch.float32)
        cases.append((rows, empty_weight(shape, "int8", group_size, False, torch.float32), recipe))
    return cases


quantize_op = Op(
    name="quantize",
    schema="(Tensor rows, Weight weight, Recipe recipe) -> Weight",
    check=_check,
    reference=_reference,
    samples=_samples,
    case=lambda rows, out, recipe: (recipe, out.key, rows.dtype),
    errors=_errors,
    title=lambda recipe, key, dtype: f"quantizer of {recipe.title}",
    kinds=(),
)
