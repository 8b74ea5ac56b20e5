"""The native loops that make additive codebooks (csrc/aqlm_fit.h), called with tensors.

All tensors are plain and on the CPU, floats are float32, codes int32 from 0. Those of another dtype, or whose values do
not lie side by side, are refused: the loops see addresses only, and would read what lies behind them.
"""

import torch

from quanto_hf.ops.aqlm_loops import LOOPS, Loops
from quanto_hf.ops.cpu.library import NATIVE, REASON, label


def _address(tensor: torch.Tensor | None, dtype: torch.dtype = torch.float32) -> int:
    """Where the values of a tensor begin, 0 for None."""
    if tensor is None:
        return 0
    if tensor.dtype is not dtype or not tensor.is_contiguous():
        raise ValueError(
            f"the native loops take contiguous {dtype} tensors, but this one of shape {list(tensor.shape)} has strides "
            f"{tensor.stride()} and dtype {tensor.dtype}"
        )
    return tensor.data_ptr()


def native_search(targets: torch.Tensor, codebooks: torch.Tensor, codes: torch.Tensor, beam: int) -> None:
    """Better codes, in place: the arguments of :func:`quanto_hf.fit.aqlm.search.search`, ``beam`` <= ``MAX_BEAM``."""
    assert NATIVE is not None
    NATIVE.aqlm_search(
        _address(codebooks),
        *codebooks.shape,
        _address(targets),
        _address(codes, torch.int32),
        targets.shape[0],
        beam,
        torch.get_num_threads(),
    )


def native_sweep(
    state: torch.Tensor,
    weight: torch.Tensor | None,
    follow: torch.Tensor,
    lower: torch.Tensor,
    to: torch.Tensor,
    codebooks: torch.Tensor,
    codes: torch.Tensor,
    out_group: int,
    beam: int,
) -> None:
    """Better codes, column group after column group, in place: the arguments of
    :func:`quanto_hf.fit.aqlm.sweep.sweep`, ``beam`` up to ``MAX_BEAM``."""
    assert NATIVE is not None
    NATIVE.aqlm_sweep(
        _address(codebooks),
        *codebooks.shape,
        _address(state),
        _address(weight),
        _address(follow),
        _address(lower),
        _address(to),
        _address(codes, torch.int32),
        *codes.shape[:2],
        out_group,
        lower.shape[-1],
        beam,
        torch.get_num_threads(),
    )


def native_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` for matrices, equal to the last bit for any number of threads.

    Args:
        a: shape (m, k).
        b: shape (k, n); its rows need not lie side by side.
    """
    assert NATIVE is not None
    if b.dtype is not torch.float32 or (b.stride(1) != 1 and b.shape[1] > 1):
        raise ValueError(f"the rows of b are not contiguous float32 values: strides {b.stride()}, dtype {b.dtype}")
    out = a.new_empty(a.shape[0], b.shape[1])
    NATIVE.product(
        _address(a), b.data_ptr(), out.data_ptr(), *out.shape, a.shape[1], b.stride(0), torch.get_num_threads()
    )
    return out


def native_code_sums(
    values: torch.Tensor, weights: torch.Tensor, codes: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum, and sum of weights, of the groups of each code: the arguments and the result of
    :func:`quanto_hf.fit.aqlm.loops.torch_code_sums`."""
    assert NATIVE is not None
    groups, count = codes.shape
    sums = values.new_zeros((count, size, values.shape[1]), dtype=torch.float64)
    totals = values.new_zeros((count, size), dtype=torch.float64)
    NATIVE.code_sums(
        _address(values),
        _address(weights),
        _address(codes, torch.int32),
        sums.data_ptr(),
        totals.data_ptr(),
        groups,
        groups // weights.shape[0],
        count,
        size,
        values.shape[1],
        torch.get_num_threads(),
    )
    return sums, totals


LOOPS["cpu"] = Loops(
    lambda: REASON if NATIVE is None else None, label, native_search, native_sweep, native_product, native_code_sums
)
