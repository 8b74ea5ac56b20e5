"""Quantizing on the CPU in one pass over the weight, over rows in parallel (csrc/quantize.h, csrc/fit.h)."""

from array import array
from dataclasses import dataclass

import torch

from quanto_hf.ops.cpu.call import FLOAT_TYPES
from quanto_hf.ops.cpu.library import NATIVE, REASON
from quanto_hf.ops.registry import reference_only
from quanto_hf.ops.scratch import scratch
from quanto_hf.ops.watched import watched
from quanto_hf.qtypes import QTYPES

# The numbers of csrc/common.h.
FITS = {"range": 0, "mse": 1, "hqq": 2}
# A full group is a whole number of vectors, of at most 16 lanes.
LANES = 16
# Values that are copied at a time where C++ cannot read them as they lie: 1 MB.
COPIED_VALUES = 1 << 18


@dataclass(frozen=True)
class NativeFit:
    """A fit, and the grid that it serves, in the words of csrc/common.h.

    Args:
        kind: one of ``FITS``.
        numbers: lowest and highest number of the grid, then those of the fit.
        table: None or 129 float32, as csrc/grid.h describes them.
    """

    kind: str
    numbers: tuple[float, ...]
    table: torch.Tensor | None = None


def refuses_quantize(rows: torch.Tensor, out: dict[str, torch.Tensor], group_size: int) -> str | None:
    """Why these rows are not quantized natively, or None."""
    asked = reference_only()  # raises where QUANTO_HF_CPU is wrong, and nothing is native then
    if NATIVE is None:
        return REASON
    if asked:
        return "QUANTO_HF_REFERENCE is set"
    if not rows.is_cpu:
        return "it runs on CPU only"
    # also under torch.compile and FakeTensorMode, where there is no memory to point at
    if type(rows) is not torch.Tensor or any(type(t) is not torch.Tensor for t in out.values()):
        return "it takes plain tensors only"
    if torch.compiler.is_compiling() or watched():
        return "torch.compile and other modes of torch cannot follow it"
    if group_size > 0 and group_size % LANES:
        return f"the group size is no multiple of {LANES}"
    return None


def native_quantize(
    rows: torch.Tensor, out: dict[str, torch.Tensor], qtype: str, group_size: int, fit: NativeFit
) -> bool:
    """Quantize ``rows`` into ``out``, whose tensors are contiguous: ``packed``, ``scale`` and perhaps ``zero``.

    Args:
        rows: floats of shape (rows, columns), neither of them 0. Where the values of a row do not lie side by side, or
            are float64, blocks of rows are copied to float32.
        group_size: columns that share a scale, -1 for whole rows.

    Returns:
        False if a value or a scale is not finite: what is in ``out`` then means nothing.
    """
    columns = rows.shape[1]
    if rows.dtype in FLOAT_TYPES and (columns == 1 or rows.stride(1) == 1) and not rows.is_neg():
        return _quantize(rows, out, qtype, group_size, fit)
    step = max(1, COPIED_VALUES // columns)
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        copy = scratch("values", tuple(part.shape), torch.float32, rows.device).copy_(part)
        if not _quantize(copy, {name: t[start : start + step] for name, t in out.items()}, qtype, group_size, fit):
            return False
    return True


def _quantize(rows: torch.Tensor, out: dict[str, torch.Tensor], qtype: str, group_size: int, fit: NativeFit) -> bool:
    assert NATIVE is not None
    numbers, zero, code = array("d", fit.numbers), out.get("zero"), QTYPES[qtype].native
    assert code is not None
    finite: bool = NATIVE.quantize(
        rows.data_ptr(),
        out["packed"].data_ptr(),
        out["scale"].data_ptr(),
        0 if zero is None else zero.data_ptr(),
        0 if fit.table is None else fit.table.data_ptr(),
        numbers.buffer_info()[0],
        len(numbers),
        *rows.shape,
        rows.stride(0),
        max(group_size, 0),
        FLOAT_TYPES[rows.dtype],
        FLOAT_TYPES[out["scale"].dtype],
        code,
        FITS[fit.kind],
        torch.get_num_threads(),
    )
    return finite
