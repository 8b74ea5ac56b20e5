"""How grouped schemes quantize: by the op ``quantize``, or all at once by a fit that wants second moments."""

from typing import TYPE_CHECKING

import torch

from quanto_hf.fit import Context, Fit, native_fit
from quanto_hf.ops import pack, quantize_op
from quanto_hf.ops.quantize import BLOCK_VALUES, NOT_FINITE, Recipe

if TYPE_CHECKING:
    from quanto_hf.schemes.grouped import Grouped

Parts = dict[str, torch.Tensor]

# The error of a weight is measured on 64 rows, in three float32 tensors.
ERROR_ROWS, ERROR_BYTES = 64, 12
# Making the lookup table of nf4 or fp4, once per device.
TABLE_BYTES = 20 << 20


def quantize_weight(scheme: "Grouped", weight: torch.Tensor, fit: Fit, context: Context) -> Parts:
    """See :meth:`quanto_hf.schemes.Scheme.quantize`."""
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
        # a graph holds what torch computes
        run = quantize_op.reference if torch.compiler.is_compiling() else quantize_op
        run(flat, scheme._stored(parts, columns), recipe(scheme, fit))
    return result


def recipe(scheme: "Grouped", fit: Fit) -> Recipe:
    """How ``fit`` finds the scales of the scheme, in the words of the op."""
    grid, scale_type = scheme.grid, scheme.scale_type
    return Recipe(
        title=f"{scheme} weights with fit {fit!r}",
        key=(scheme, fit),
        find=lambda values: fit(values, grid, scale_type),
        encode=grid.encode,
        native=native_fit(fit, grid) if scheme.has_kernels else None,
        store=scale_type.store,
    )


def workspace_bytes(scheme: "Grouped", shape: tuple[int, int], fit: Fit, device: str, calibrated: bool) -> int:
    """See :meth:`quanto_hf.schemes.Scheme.workspace_bytes`."""
    rows, columns = shape
    if not rows or not columns:
        return 0
    if calibrated and fit.wants_moments:
        return 12 * rows * columns + 24 * columns**2
    if device == "cpu":
        return 0
    block = min(rows, max(1, BLOCK_VALUES // columns)) * columns
    table = TABLE_BYTES if scheme.type.kind == "table" else 0
    return fit.block_bytes * block + ERROR_BYTES * min(rows, ERROR_ROWS) * columns + table


def quantize_whole(scheme: "Grouped", rows: torch.Tensor, fit: Fit, out: Parts, context: Context) -> bool:
    """Quantize all rows at once with a fit that chooses codes by second moments.

    Returns:
        False: it leaves the codes to the other ways.

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
