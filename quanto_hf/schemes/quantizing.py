"""The two ways in which grouped schemes quantize: one native pass, or torch on blocks of rows."""

from functools import cache
from typing import TYPE_CHECKING

import torch

from quanto_hf.fit import Context, Fit, native_fit
from quanto_hf.ops import dequantize, pack
from quanto_hf.ops.cpu.library import NATIVE
from quanto_hf.ops.cpu.quantize import native_quantize, refuses_quantize
from quanto_hf.ops.cpu.selfcheck import report, undisturbed
from quanto_hf.ops.scratch import scratch

if TYPE_CHECKING:
    from quanto_hf.schemes.grouped import Grouped

Parts = dict[str, torch.Tensor]

# Values that are fitted at a time. The float32 temporaries of a fit (about 4 of this size) stay in a 1 MB L2 cache
# at 64 k values, but then the calls cost more than the work: 256 k is the fastest of 64 k to 4 M for int4 and int2.
BLOCK_VALUES = 1 << 18
# The native way may end this much farther from the weight than torch, in all: searches break ties differently, which
# moves the error by less than 0.1 % (tests/ops/cpu/test_quantize.py).
MORE_ERROR = 0.02
NOT_FINITE = "the weight has NaN or infinite values, which cannot be quantized"
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
    if not (
        (fit.wants_moments and quantize_whole(scheme, flat, fit, parts, context))
        or quantize_natively(scheme, flat, fit, parts)
    ):
        quantize_in_blocks(scheme, flat, fit, parts)
    return result


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


def quantize_natively(scheme: "Grouped", rows: torch.Tensor, fit: Fit, out: Parts) -> bool:
    """Quantize all rows with the native library.

    Args:
        scheme: what to quantize to.
        rows: shape (rows, columns), neither of them 0.
        fit: what finds scale and zero.
        out: the tensors of the scheme, in 2 dimensions.

    Returns:
        False: it cannot, or it is wrong on this machine, or the weight has values that are not finite. What is in
        ``out`` then means nothing.
    """
    if not scheme.has_kernels:
        return False
    if refuses_quantize(rows, out, scheme.group_size) is not None:
        return False
    assert NATIVE is not None
    native = native_fit(fit, scheme.grid)
    if native is None or why_wrong(NATIVE.level(), scheme, fit, rows.dtype) is not None:
        return False
    return native_quantize(rows, out, scheme.qtype, scheme.group_size, native)


def quantize_in_blocks(scheme: "Grouped", rows: torch.Tensor, fit: Fit, out: Parts) -> None:
    """The same in torch.

    Raises:
        ValueError: the weight has NaN or infinite values.
    """
    step = max(1, BLOCK_VALUES // rows.shape[1])
    # under autocast the products of a fit would be rounded to 16 bits
    with torch.autocast(rows.device.type, enabled=False):
        for start in range(0, rows.shape[0], step):
            block = {name: tensor[start : start + step] for name, tensor in out.items()}
            _quantize_rows(scheme, rows[start : start + step], fit, block)


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


def _quantize_rows(scheme: "Grouped", rows: torch.Tensor, fit: Fit, out: Parts) -> None:
    """Quantize a block of rows into views of the result."""
    n, columns = rows.shape
    values = scratch("values", (n, columns), torch.float32, rows.device).copy_(rows)
    codes = out["packed"]
    if scheme.type.is_packed:
        codes = scratch("codes", (n, columns), torch.uint8, rows.device)
    for cut, which in _cuts(columns, scheme.group_size):
        # (rows * groups, columns of a group): what shares a scale is a row
        part = values[:, cut].unflatten(1, (which.stop - which.start, -1))
        width = part.shape[-1]
        scale, zero = fit(part.reshape(-1, width), scheme.grid, scheme.scale_type)
        if not torch.isfinite(scale).all():
            raise ValueError(NOT_FINITE)
        out["scale"][:, which] = scheme.scale_type.store(scale.view(n, -1))
        u = scratch("scaled", tuple(part.shape), torch.float32, rows.device)
        torch.div(part, scale.view(n, -1, 1), out=u)
        if zero is not None:
            out["zero"][:, which] = scheme.scale_type.store(zero.view(n, -1))
            u += zero.view(n, -1, 1)
        scheme.grid.encode(u, codes[:, cut].unflatten(1, (which.stop - which.start, -1)))
    if scheme.type.is_packed:
        out["packed"].copy_(pack(codes, scheme.type.bits))


def _cuts(columns: int, group_size: int) -> list[tuple[slice, slice]]:
    """Columns and groups of the full groups, and of the shorter last one."""
    size = group_size if group_size > 0 else columns
    full = columns // size
    cuts = [(slice(0, full * size), slice(0, full))] if full else []
    if columns % size:
        cuts.append((slice(full * size, columns), slice(full, full + 1)))
    return cuts


@cache
@undisturbed()
def why_wrong(level: str, scheme: "Grouped", fit: Fit, dtype: torch.dtype) -> str | None:
    """None if the native quantizer does as well as torch on a small random weight, else the sentence that says so.

    Args:
        level: the instructions in use (results are kept per level).
        scheme: what to quantize to.
        fit: what finds scale and zero.
        dtype: of the weight.
    """
    native = native_fit(fit, scheme.grid)
    assert native is not None
    # two whole groups and a short one, or a row of odd width
    weight = torch.randn(
        5, 2 * max(scheme.group_size, 128) + 77, generator=torch.Generator().manual_seed(0), dtype=torch.float32
    )
    rows = weight.to(dtype)
    columns = rows.shape[1]
    specs = scheme.tensors((rows.shape[0], columns), dtype)

    def error(tensors: Parts) -> float:
        # the definition of the numbers, not the native reading of them
        packed, scale, zero = tensors["packed"], tensors["scale"], tensors.get("zero")
        made = dequantize.reference(packed, scale, zero, scheme.qtype, scheme.group_size, columns, torch.float32)
        return float((made - rows.float()).norm())

    exact, made = ({name: torch.zeros(s.shape, dtype=s.dtype) for name, s in specs.items()} for _ in range(2))
    quantize_in_blocks(scheme, rows, fit, exact)
    native_quantize(rows, made, scheme.qtype, scheme.group_size, native)
    ratio = error(made) / error(exact)
    if ratio <= 1 + MORE_ERROR:
        return None
    return report(f"{level} quantizer of {scheme} weights with fit {fit!r}", ratio - 1)
