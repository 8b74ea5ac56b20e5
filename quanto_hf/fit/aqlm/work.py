"""How long it takes to make additive codebooks: products that are counted, and the speed of a small sample."""

import time

import torch

from quanto_hf.fit.aqlm.books import GROUPS_PER_VECTOR, ROUNDS, STEPS_WITH_HESSIAN
from quanto_hf.fit.aqlm.layout import Layout
from quanto_hf.fit.aqlm.quantize import BEAM, ITERATIONS, ITERATIONS_WITH_HESSIAN, WARM_UP, quantize_aqlm

# Products that the sample is about: 0.1 to 0.3 s on a core.
SAMPLE = 1 << 30


def products(shape: tuple[int, int], layout: Layout, calibrated: bool) -> float:
    """About how many products it takes to quantize a weight.

    Args:
        shape: (out_features, in_features).
        layout: of the groups.
        calibrated: whether for given inputs.
    """
    rows, columns = layout.grid(shape)
    groups, vector = rows * columns, layout.size * layout.width
    chosen = groups * vector * (1 + BEAM * (layout.num_codebooks - 1))
    clustered = layout.num_codebooks * vector * (min(groups, GROUPS_PER_VECTOR * layout.size) * ROUNDS + groups)
    if not calibrated:
        return float(clustered + (ITERATIONS + 1) * chosen)
    passes = ITERATIONS_WITH_HESSIAN + 2
    # a pass starts with a product of matrices and ends with half of one; codebooks take one for each step
    squares = passes * 1.5 + (ITERATIONS_WITH_HESSIAN + 1) * (STEPS_WITH_HESSIAN + 2)
    return float(clustered + (WARM_UP + passes) * chosen + squares * shape[0] * shape[1] ** 2)


def products_per_second(layout: Layout, calibrated: bool) -> float:
    """The speed of this machine, with the threads that torch uses now, measured on a random weight."""
    columns = layout.in_group * max(1, 256 // layout.in_group)
    rows = layout.out_group
    while products((2 * rows, columns), layout, calibrated) < SAMPLE:
        rows *= 2
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    start = time.perf_counter()
    quantize_aqlm(
        weight, num_codebooks=layout.num_codebooks, nbits=layout.nbits, out_group=layout.out_group,
        in_group=layout.in_group, hessian=torch.eye(columns, dtype=torch.float32) if calibrated else None,
    )  # fmt: skip
    return products((rows, columns), layout, calibrated) / (time.perf_counter() - start)
