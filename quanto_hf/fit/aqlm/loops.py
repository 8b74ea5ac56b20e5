"""The loops that take the time: native where they can be, else in torch.

The native ones give the same bits for any number of threads; they are compared with torch once before they are used.
"""

from typing import Any

import torch

from quanto_hf.fit.aqlm.layout import Layout, decode
from quanto_hf.fit.aqlm.search import search as torch_search
from quanto_hf.fit.aqlm.sweep import sweep as torch_sweep
from quanto_hf.ops.aqlm_loops import LOOPS, Loops, refuses_loops
from quanto_hf.ops.selfcheck import checked

# Values that are summed at a time: torch splits longer sums among threads, and their rounding then depends on how many.
SUMMED = 1 << 14
# Groups of a small problem whose native distance, or sums, may differ from those in torch by more than this share.
TOLERANCE = 1e-4


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum of all values, in an order that no number of threads changes; a tensor without dimensions."""
    return torch.stack([part.sum() for part in values.flatten().split(SUMMED)]).sum()


def row_totals(values: torch.Tensor) -> torch.Tensor:
    """The same for each row of a matrix."""
    return torch.stack([part.sum(1) for part in values.split(SUMMED, dim=1)]).sum(0)


def torch_code_sums(
    values: torch.Tensor, weights: torch.Tensor, codes: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum, and sum of weights, of the groups of each code.

    Args:
        values: float32, shape (groups, values).
        weights: float32, shape (row groups,): as many groups one after another share a weight.
        codes: int32, shape (groups, K).
        size: vectors of a codebook.

    Returns:
        float64, shapes (K, size, values) and (K, size).
    """
    each = weights.double().repeat_interleave(values.shape[0] // weights.shape[0])
    weighted = values.double() * each[:, None]
    sums = weighted.new_zeros((codes.shape[1], size, values.shape[1]))
    totals = weighted.new_zeros((codes.shape[1], size))
    for k in range(codes.shape[1]):
        sums[k].index_add_(0, codes[:, k], weighted)
        totals[k].index_add_(0, codes[:, k], each)
    return sums, totals


# what the native loops are compared with: the definition of each
TORCH = Loops(lambda: None, lambda: "torch", torch_search, torch_sweep, torch.matmul, torch_code_sums)


def runs_native(device: torch.device) -> bool:
    """Whether the loops on this device are the native ones."""
    if refuses_loops(device) is not None:
        return False
    loops = LOOPS[device.type]
    return why_wrong(loops.label(), loops) is None


def loops_on(device: torch.device) -> Loops:
    """The loops for tensors on this device: the native ones, or those in torch."""
    return LOOPS[device.type] if runs_native(device) else TORCH


@checked(lambda label, loops: f"{label} loops of additive codebooks")
def why_wrong(label: str, loops: Loops) -> list[tuple[float, float]]:
    """How far the native loops are off those in torch on a small random problem.

    Args:
        label: the instructions in use (results are kept for each).
    """
    return [(error, TOLERANCE) for error in (_search_error(loops), _sweep_error(loops), _sums_error(loops))]


def _problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, codebooks and codes of awkward sizes: 37 row groups of 2 rows, 13 column groups of 5."""
    generator = torch.Generator().manual_seed(0)
    codebooks = torch.randn(3, 70, 10, generator=generator, dtype=torch.float32)
    codes = torch.randint(70, (37, 13, 3), generator=generator, dtype=torch.int32)
    return torch.randn(37 * 13, 10, generator=generator, dtype=torch.float32), codebooks, codes


def _search_error(loops: Loops) -> float:
    targets, codebooks, start = _problem()
    errors = []
    for run in (torch_search, loops.search):
        codes = start.reshape(-1, 3).clone()
        run(targets, codebooks, codes, 4)
        errors.append(float((targets - decode(codes, codebooks)).square().sum()))
    return abs(errors[1] / errors[0] - 1)


def _sweep_error(loops: Loops) -> float:
    _, codebooks, start = _problem()
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(200, 65, generator=generator, dtype=torch.float32)
    hessian = inputs.T @ inputs / 200
    blocks = torch.stack([hessian[i : i + 5, i : i + 5] for i in range(0, 65, 5)])
    lower = torch.linalg.cholesky(blocks).contiguous()
    inverse = torch.linalg.inv(lower).transpose(1, 2).contiguous()
    layout, weight = Layout(3, 7, 2, 5), torch.randn(74, 65, generator=generator, dtype=torch.float32)
    worst = 0.0
    for ahead in (False, True):
        errors = []
        ways: tuple[Any, ...] = ((torch_sweep, torch.mm), (loops.sweep, loops.product))
        for run, multiply in ways:
            codes = start.clone()
            # what a pass starts from need not mean anything here
            state = multiply(weight - layout.to_weight(decode(codes, codebooks)), hessian)
            run(state, weight if ahead else None, hessian, lower, inverse, codebooks, codes, 2, 4)
            error = weight - layout.to_weight(decode(codes, codebooks))
            errors.append(float((error @ hessian * error).sum()))
        worst = max(worst, abs(errors[1] / errors[0] - 1))
    return worst


def _sums_error(loops: Loops) -> float:
    values, _, codes = _problem()
    codes, weights = (
        codes.reshape(-1, 3),
        torch.rand(37, generator=torch.Generator().manual_seed(2), dtype=torch.float32),
    )
    made, exact = (run(values, weights, codes, 70) for run in (loops.code_sums, torch_code_sums))
    return max(float((a - b).abs().nan_to_num(nan=torch.inf).max()) for a, b in zip(made, exact, strict=True))
