"""The vectors of the codebooks: a start by k-means, then least squares for the codes as they are."""

import torch

from quanto_hf.fit.aqlm.layout import Layout, decode
from quanto_hf.fit.aqlm.loops import loops_on, total
from quanto_hf.fit.aqlm.metric import Metric

# k-means sees at most this many groups for each vector: more do not change what it finds.
GROUPS_PER_VECTOR = 256
# Rounds of k-means for each codebook. The least squares that follow move everything anyway.
ROUNDS = 8
# Steps of conjugate gradients: without a Hessian until nothing is left to gain in float32, which takes 5 to 10.
STEPS, STEPS_WITH_HESSIAN = 30, 6
ENOUGH = 1e-12


def start(targets: torch.Tensor, weights: torch.Tensor, layout: Layout, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codebooks and codes by residual k-means: each codebook is made of what those before it leave.

    Args:
        targets: float32, shape (row groups, column groups, values).
        weights: what the error of each row group counts, shape (row groups,).
        layout: sizes of the codebooks.
        seed: of the choice of the first vectors.

    Returns:
        Codebooks of shape (K, vectors, values), and int32 codes of shape (row groups, column groups, K).
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns, width = targets.shape
    rest = targets.reshape(-1, width).clone()
    each = weights.repeat_interleave(columns)
    codebooks, codes, loops = [], [], loops_on(rest.device)
    for _ in range(layout.num_codebooks):
        order = torch.randperm(rest.shape[0], generator=generator, device="cpu", dtype=torch.int64).to(rest.device)
        book = _first_vectors(rest, order, layout.size)
        sample = order[: GROUPS_PER_VECTOR * layout.size]
        values, value_weights = rest[sample].contiguous(), each[sample].contiguous()
        code = torch.zeros(values.shape[0], 1, dtype=torch.int32, device=rest.device)
        for _ in range(ROUNDS):
            loops.search(values, book, code, 1)
            sums, totals = loops.code_sums(values, value_weights, code, layout.size)
            means = (sums / totals.unsqueeze(-1).clamp(min=1e-30)).float()
            # a vector that is nearest to no group stays where it is
            book = torch.where(totals.unsqueeze(-1) > 0, means, book)
        code = torch.zeros(rest.shape[0], 1, dtype=torch.int32, device=rest.device)
        loops.search(rest, book, code, 1)
        rest -= decode(code, book)
        codebooks.append(book[0])
        codes.append(code)
    return torch.stack(codebooks), torch.cat(codes, 1).view(rows, columns, -1)


def _first_vectors(groups: torch.Tensor, order: torch.Tensor, size: int) -> torch.Tensor:
    """The first groups in the order, again from the start where there are too few; shape (1, size, values)."""
    chosen = order[torch.arange(size, device=groups.device, dtype=torch.int64) % order.numel()]
    return groups[chosen].unsqueeze(0).contiguous()


def least_squares(
    codebooks: torch.Tensor,
    codes: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    layout: Layout,
    metric: Metric | None,
) -> torch.Tensor:
    """All codebooks at once, of least weighted squared error for these codes, from the present ones on.

    The normal equations are solved by conjugate gradients, with the diagonal of their matrix as preconditioner. Vectors
    that no group uses stay where they are.

    Args:
        codebooks: float32, shape (K, vectors, values).
        codes: int32, shape (row groups, column groups, K).
        targets: float32, shape (row groups, column groups, values).
        weights: what the error of each row group counts.
        layout: how groups lie in the weight.
        metric: of the error of a row; None is the plain squared error.

    Returns:
        New codebooks.
    """
    flat, loops = codes.reshape(-1, codes.shape[-1]), loops_on(codes.device)

    def gathered(groups: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the groups of each vector, after the Hessian."""
        if metric is not None:
            groups = layout.to_groups(loops.product(layout.to_weight(groups), metric.hessian))
        return loops.code_sums(groups.reshape(flat.shape[0], -1), weights, flat, layout.size)[0]

    if metric is None:
        diagonal = loops.code_sums(targets.reshape(flat.shape[0], -1), weights, flat, layout.size)[1].unsqueeze(-1)
    else:
        # with a single column group this would stay a view of one row
        curvature = metric.diagonal(layout).expand(codes.shape[0], -1, -1).reshape(flat.shape[0], -1).contiguous()
        diagonal = loops.code_sums(curvature, weights, flat, layout.size)[0]
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    solution = codebooks.double()
    residual = gathered(targets - decode(codes, codebooks))
    step = inverse * residual
    direction, slope = step, total(step * residual)
    first = slope
    for _ in range(STEPS if metric is None else STEPS_WITH_HESSIAN):
        if not slope > ENOUGH * first:
            break
        image = gathered(decode(codes, direction.float()))
        curve = total(direction * image)
        if not curve > 0:
            break
        length = slope / curve
        solution += length * direction
        residual -= length * image
        step = inverse * residual
        new = total(step * residual)
        direction, slope = step + new / slope * direction, new
    return solution.float()
