"""Registers the native kernel of ``quantize``: one pass over the weight, over rows in parallel (csrc/quantize.h,
csrc/fit.h)."""

from array import array

import torch

from quanto_hf.ops.cpu.call import FLOAT_TYPES
from quanto_hf.ops.cpu.library import NATIVE, REASON, label
from quanto_hf.ops.quantize import NativeFit, Recipe, quantize_op
from quanto_hf.ops.scratch import scratch
from quanto_hf.ops.watched import watched
from quanto_hf.ops.weight import GroupedWeight

# The numbers of csrc/common.h.
FITS = {"range": 0, "mse": 1, "hqq": 2}
# A full group is a whole number of vectors, of at most 16 lanes.
LANES = 16
# Values that are copied at a time where C++ cannot read them as they lie: 1 MB.
COPIED_VALUES = 1 << 18


def _supports(rows: torch.Tensor, out: GroupedWeight, recipe: Recipe) -> str | None:
    if NATIVE is None:
        return REASON
    # also under FakeTensorMode, where there is no memory to point at
    if type(rows) is not torch.Tensor or any(t is not None and type(t) is not torch.Tensor for t in out.stored):
        return "it takes plain tensors only"
    if watched():
        return "torch follows every operator here: a dispatch mode, a transform or a trace is active"
    if out.type.native is None:
        return f"there is no native code for {out.qtype} weights"
    if out.group_size > 0 and out.group_size % LANES:
        return f"the group size is no multiple of {LANES}"
    if recipe.native is None:
        return "the fit is not one that it knows"
    return None


@quantize_op.kernel("native", _supports, device="cpu", kinds=(GroupedWeight,), label=label)
def _quantize(rows: torch.Tensor, out: GroupedWeight, recipe: Recipe) -> GroupedWeight:
    """Scales are found and codes chosen in one pass; the definition says what is wrong with values that are not
    finite."""
    assert recipe.native is not None
    if not native_quantize(rows, out, recipe.native):
        quantize_op.reference(rows, out, recipe)
    return out


def native_quantize(rows: torch.Tensor, out: GroupedWeight, fit: NativeFit) -> bool:
    """Quantize ``rows`` into ``out``, whose tensors are contiguous.

    Args:
        rows: floats of shape (rows, columns), neither of them 0. Where the values of a row do not lie side by side, or
            are float64, blocks of rows are copied to float32.

    Returns:
        False if a value or a scale is not finite: what is in ``out`` then means nothing.
    """
    columns = rows.shape[1]
    if rows.dtype in FLOAT_TYPES and (columns == 1 or rows.stride(1) == 1) and not rows.is_neg():
        return _run(rows, out, fit)
    step = max(1, COPIED_VALUES // columns)
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        copy = scratch("values", tuple(part.shape), torch.float32, rows.device).copy_(part)
        if not _run(copy, out.rows(slice(start, start + step)), fit):
            return False
    return True


def _run(rows: torch.Tensor, out: GroupedWeight, fit: NativeFit) -> bool:
    assert NATIVE is not None
    numbers, code = array("d", fit.numbers), out.type.native
    assert code is not None
    finite: bool = NATIVE.quantize(
        rows.data_ptr(),
        out.packed.data_ptr(),
        out.scale.data_ptr(),
        0 if out.zero is None else out.zero.data_ptr(),
        0 if fit.table is None else fit.table.data_ptr(),
        numbers.buffer_info()[0],
        len(numbers),
        *rows.shape,
        rows.stride(0),
        max(out.group_size, 0),
        FLOAT_TYPES[rows.dtype],
        FLOAT_TYPES[out.scale.dtype],
        code,
        FITS[fit.kind],
        torch.get_num_threads(),
    )
    return finite
