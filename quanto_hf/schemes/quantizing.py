"""Methods of grouped schemes that quantize: by the op, or with a fit that chooses the codes of a whole weight."""

from typing import TYPE_CHECKING

import torch

from quanto_hf.fit import NO_CONTEXT, AnyFit, Context, Fit, native_fit
from quanto_hf.ops import pack, quantize_op
from quanto_hf.ops.quantize import BLOCK_VALUES, NOT_FINITE, Recipe

if TYPE_CHECKING:
    from quanto_hf.schemes.grouped import Grouped

Parts = dict[str, torch.Tensor]

# The error of a weight is measured on 64 rows, in three float32 tensors.
ERROR_ROWS, ERROR_BYTES = 64, 12
# Making the lookup table of nf4 or fp4, once per device.
TABLE_BYTES = 20 << 20


def quantize(scheme: "Grouped", weight: torch.Tensor, fit: AnyFit = None, context: Context = NO_CONTEXT) -> Parts:
    """The stored tensors of a float weight: one native pass over it, or torch on blocks of rows through reused buffers,
    about 8 MB beyond the result. A fit that wants second moments sees the whole weight in float32.

    Raises:
        ValueError: the weight has another shape or dtype than a weight, or NaN or infinite values.
    """
    fit = scheme.fit_of(fit)
    if weight.dim() < 2 or not weight.is_floating_point():
        raise ValueError(
            f"a weight has a float dtype and at least 2 dimensions, "
            f"but this one has dtype {weight.dtype} and shape {tuple(weight.shape)}"
        )
    if weight.shape[-1] == 0:
        raise ValueError(f"a weight has at least 1 column, but this one has shape {tuple(weight.shape)}")
    specs = scheme.tensors(tuple(weight.shape), weight.dtype)
    result = {name: torch.empty(s.shape, dtype=s.dtype, device=weight.device) for name, s in specs.items()}
    columns = weight.shape[-1]
    if weight.numel() == 0 or weight.device.type == "meta":
        return result
    flat = weight.detach().reshape(-1, columns)
    parts = {name: tensor.view(flat.shape[0], -1) for name, tensor in result.items()}
    if not (fit.wants_moments and quantize_whole(scheme, flat, fit, parts, context)):
        quantize_rows(scheme, flat, fit, parts)
    return result


def workspace_bytes(
    scheme: "Grouped",
    shape: tuple[int, int],
    dtype: torch.dtype,
    fit: AnyFit = None,
    *,
    device: str = "cpu",
    calibrated: bool = False,
) -> int:
    """Most bytes of temporaries. In torch, as on an accelerator, an upper bound within a few MB. With second moments
    about what a fit takes that holds the weight, what is left of it, and three moments, in float32."""
    rows, columns = shape
    fit = scheme.fit_of(fit)
    if not rows or not columns:
        return 0
    if calibrated and fit.wants_moments:
        return 12 * rows * columns + 24 * columns**2
    if device == "cpu":
        return 0
    block = min(rows, max(1, BLOCK_VALUES // columns)) * columns
    table = TABLE_BYTES if scheme.type.kind == "table" else 0
    return fit.block_bytes * block + ERROR_BYTES * min(rows, ERROR_ROWS) * columns + table


def recipe(scheme: "Grouped", fit: Fit) -> Recipe:
    """How ``fit`` finds the scales of the scheme, in the words of the op."""
    grid, kind = scheme.grid, scheme.scale_type
    return Recipe(
        title=f"{scheme} weights with fit {fit!r}",
        key=(scheme, fit),
        find=lambda values: fit(values, grid, kind),
        encode=grid.encode,
        # kernels round scales to floats
        native=native_fit(fit, grid) if kind.is_float else None,
    )


def quantize_rows(scheme: "Grouped", rows: torch.Tensor, fit: Fit, out: Parts) -> None:
    """Quantize all rows into ``out``: with a kernel of its own where there is one, else in torch on blocks of rows.

    Args:
        scheme: what to quantize to.
        rows: floats of shape (rows, columns), neither of them 0.
        fit: what finds scale and zero.
        out: the tensors of the scheme, in 2 dimensions.

    Raises:
        ValueError: the weight has NaN or infinite values.
    """
    # a graph holds what torch computes
    run = quantize_op.reference if torch.compiler.is_compiling() else quantize_op
    made = scheme.weight(out, rows.shape[1])
    run(rows, made, recipe(scheme, fit))
    if not scheme.scale_type.is_float:
        # the op has made scales that can be stored exactly
        for name, numbers in (("scale", made.scale), ("zero", made.zero)):
            if numbers is not None:
                out[name].copy_(scheme.scale_type.store(numbers))


def quantize_whole(scheme: "Grouped", rows: torch.Tensor, fit: Fit, out: Parts, context: Context) -> bool:
    """Quantize all rows at once with a fit that chooses codes by second moments.

    Returns:
        False: it leaves the codes to the other way.

    Raises:
        ValueError: the weight, or a scale that the fit has found, has NaN or infinite values.
    """
    values = rows.float()
    if not torch.isfinite(values).all():
        raise ValueError(NOT_FINITE)
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        found = fit.round_rows(values, scheme.grid, scheme.scale_type, scheme.group_size, context)
    if found is None:
        return False
    if not torch.isfinite(found.scale).all():
        raise ValueError(f"fit={fit!r} has found scales that are NaN or infinite")
    out["packed"].copy_(pack(found.codes, scheme.type.bits))
    for name, numbers in (("scale", found.scale), ("zero", found.zero)):
        if numbers is not None:
            out[name].copy_(scheme.scale_type.store(numbers))
    return True
