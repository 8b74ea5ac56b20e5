"""How the fit of a grouped scheme is handed to the op ``quantize``."""

from typing import TYPE_CHECKING

import torch

from quanto_hf.fit import Fit, native_fit
from quanto_hf.ops import GroupedWeight, quantize_op
from quanto_hf.ops.quantize import Recipe

if TYPE_CHECKING:
    from quanto_hf.schemes.grouped import Grouped


def recipe(scheme: "Grouped", fit: Fit) -> Recipe:
    """How ``fit`` finds the scales of the scheme, in the words of the op."""
    grid = scheme.grid
    return Recipe(
        title=f"{scheme} weights with fit {fit!r}",
        key=(scheme, fit),
        find=lambda values, dtype: fit(values, grid, dtype),
        encode=grid.encode,
        native=native_fit(fit, grid),
    )


def quantize_rows(scheme: "Grouped", rows: torch.Tensor, fit: Fit, out: GroupedWeight) -> None:
    """Quantize all rows into ``out``: with a kernel of its own where there is one, else in torch on blocks of rows.

    Args:
        scheme: what to quantize to.
        rows: shape (rows, columns), neither of them 0.
        fit: what finds scale and zero.
        out: the tensors of the scheme, in 2 dimensions.

    Raises:
        ValueError: the weight has NaN or infinite values.
    """
    # a graph holds what torch computes
    run = quantize_op.reference if torch.compiler.is_compiling() else quantize_op
    run(rows, out, recipe(scheme, fit))
