"""Schemes in which neighbouring columns of a row share a scale: integers, 8-bit floats and tables."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from quanto_hf.fit import Fit, Grid, fit_by_name, native_fit
from quanto_hf.ops import BoundLinear, activation_group, bind_linear, dequantize, groups, linear, pack, packed_width
from quanto_hf.ops.cpu.quantize import native_quantize, refuses_quantize
from quanto_hf.ops.scratch import scratch
from quanto_hf.qtypes import QTYPES, QType
from quanto_hf.schemes.base import Scheme, Tensors, TensorSpec

GROUP_SIZES = (16, 32, 64, 128, 256)
PER_CHANNEL = -1

# Values that are fitted at a time. The float32 temporaries of a fit (about 4 of this size) stay in a 1 MB L2 cache
# at 64 k values, but then the calls cost more than the work: 256 k is the fastest of 64 k to 4 M for int4 and int2.
BLOCK_VALUES = 1 << 18


@dataclass(frozen=True)
class Grouped(Scheme):
    """One scale, and one zero if the grid is asymmetric, for each group of columns of each row.

    Args:
        qtype: name of the number type.
        group_size: columns that share a scale, one of 16, 32, 64, 128, 256, or -1 for whole rows (per channel). The
            last group of a row may be shorter.
        symmetric: no zero.
    """

    qtype: str
    group_size: int = PER_CHANNEL
    symmetric: bool = True

    qtypes: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        if self.qtype not in self.qtypes:
            raise ValueError(f"{self.qtype!r} is not a type of the {self.kind} scheme; choose {_or(self.qtypes)}")
        # 64.0 is equal to 64, but cuts no tensor; "false" is true
        if type(self.group_size) is not int or self.group_size not in self._group_sizes():
            raise ValueError(
                f"group_size={self.group_size!r} does not work for {self.qtype} weights; choose "
                f"{_or(self._group_sizes())} (-1 is one scale for the whole row)"
            )
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric={self.symmetric!r} is not known; choose True or False")
        if not self.symmetric and not self._may_have_zero():
            raise ValueError(f"{self.qtype} weights are symmetric: leave out symmetric=False")

    @property
    def type(self) -> QType:
        """The number type."""
        return QTYPES[self.qtype]

    @property
    def grid(self) -> Grid:
        """The numbers that codes can stand for."""
        return Grid(self.type, self.symmetric)

    @property
    def scale_dtype(self) -> torch.dtype:
        """float32 for the few scales of whole rows; bfloat16, which has the range of float32, for groups."""
        return torch.float32 if self.group_size == PER_CHANNEL else torch.bfloat16

    def tensors(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, TensorSpec]:
        """See :class:`Scheme`: ``packed``, ``scale`` and, if asymmetric, ``zero``."""
        *rows, columns = shape
        scale = TensorSpec((*rows, groups(columns, self.group_size)), self.scale_dtype)
        specs = {
            "packed": TensorSpec((*rows, packed_width(columns, self.type.bits)), self.type.storage),
            "scale": scale,
        }
        if not self.symmetric:
            specs["zero"] = scale
        return specs

    def default_fit(self) -> Fit:
        """The best fit that needs no data, by KL on the bundled model and cosine on MiniLM; see docs/accuracy.md."""
        return fit_by_name({8: "absmax", 4: "mse", 2: "mse_gain"}[self.type.bits])

    def quantize(self, weight: torch.Tensor, fit: "Fit | str | None" = None) -> dict[str, torch.Tensor]:
        """See :class:`Scheme`. One native pass over the weight, or torch on blocks of rows through reused buffers:
        about 8 MB beyond the result.
        """
        if weight.dim() < 2 or not weight.is_floating_point():
            raise ValueError(
                f"a weight has a float dtype and at least 2 dimensions, "
                f"but this one has dtype {weight.dtype} and shape {tuple(weight.shape)}"
            )
        if weight.shape[-1] == 0:
            raise ValueError(f"a weight has at least 1 column, but this one has shape {tuple(weight.shape)}")
        found = self.default_fit() if fit is None else fit_by_name(fit)
        specs = self.tensors(tuple(weight.shape), weight.dtype)
        result = {name: torch.empty(s.shape, dtype=s.dtype, device=weight.device) for name, s in specs.items()}
        columns = weight.shape[-1]
        if weight.numel() == 0:
            return result
        flat = weight.detach().reshape(-1, columns)
        parts = {name: tensor.view(flat.shape[0], -1) for name, tensor in result.items()}
        if self._quantize_natively(flat, found, parts):
            return result
        step = max(1, BLOCK_VALUES // columns)
        # under autocast the products of a fit would be rounded to 16 bits
        with torch.autocast(weight.device.type, enabled=False):
            for start in range(0, flat.shape[0], step):
                block = {name: tensor[start : start + step] for name, tensor in parts.items()}
                self._quantize_rows(flat[start : start + step], found, block)
        return result

    def _quantize_natively(self, rows: torch.Tensor, fit: Fit, out: dict[str, torch.Tensor]) -> bool:
        """Quantize all rows with the native library. False: it cannot, or the weight cannot be quantized at all."""
        if refuses_quantize(rows, out, self.group_size) is not None:
            return False
        native = native_fit(fit, self.grid)
        return native is not None and native_quantize(rows, out, self.qtype, self.group_size, native)

    def _quantize_rows(self, rows: torch.Tensor, fit: Fit, out: dict[str, torch.Tensor]) -> None:
        """Quantize a block of rows into views of the result."""
        n, columns = rows.shape
        values = scratch("values", (n, columns), torch.float32, rows.device).copy_(rows)
        codes = out["packed"]
        if self.type.is_packed:
            codes = scratch("codes", (n, columns), torch.uint8, rows.device)
        for cut, which in self._cuts(columns):
            # (rows * groups, columns of a group): what shares a scale is a row
            part = values[:, cut].unflatten(1, (which.stop - which.start, -1))
            width = part.shape[-1]
            scale, zero = fit(part.reshape(-1, width), self.grid, self.scale_dtype)
            if not torch.isfinite(scale).all():
                raise ValueError("the weight has NaN or infinite values, which cannot be quantized")
            out["scale"][:, which] = scale.view(n, -1)
            u = scratch("scaled", tuple(part.shape), torch.float32, rows.device)
            torch.div(part, scale.view(n, -1, 1), out=u)
            if zero is not None:
                out["zero"][:, which] = zero.view(n, -1)
                u += zero.view(n, -1, 1)
            self.grid.encode(u, codes[:, cut].unflatten(1, (which.stop - which.start, -1)))
        if self.type.is_packed:
            out["packed"].copy_(pack(codes, self.type.bits))

    def _cuts(self, columns: int) -> list[tuple[slice, slice]]:
        """Columns and groups of the full groups, and of the shorter last one."""
        size = columns if self.group_size == PER_CHANNEL else self.group_size
        full = columns // size
        cuts = [(slice(0, full * size), slice(0, full))] if full else []
        if columns % size:
            cuts.append((slice(full * size, columns), slice(full, full + 1)))
        return cuts

    def dequantize(self, tensors: Tensors, in_features: int, dtype: torch.dtype) -> torch.Tensor:
        """See :class:`Scheme`."""
        packed = tensors["packed"]
        flat = {name: tensor.reshape(-1, tensor.shape[-1]) for name, tensor in tensors.items()}
        args = (flat["packed"], flat["scale"], flat.get("zero"), self.qtype, self.group_size, in_features, dtype)
        op = dequantize.torch_op if torch.compiler.is_compiling() else dequantize
        weight: torch.Tensor = op(*args)
        return weight.view(*packed.shape[:-1], in_features)

    def linear(self, x: torch.Tensor, tensors: Tensors, bias: torch.Tensor | None) -> torch.Tensor:
        """See :class:`Scheme`."""
        return linear(x, tensors["packed"], tensors["scale"], tensors.get("zero"), bias, self.qtype, self.group_size)

    def bind(self, tensors: Tensors, in_features: int, activations: str | None = None) -> BoundLinear | None:
        """See :class:`Scheme`."""
        packed, scale, zero = tensors["packed"], tensors["scale"], tensors.get("zero")
        return bind_linear(packed, scale, zero, self.qtype, self.group_size, in_features, activations)

    def activation_group(self, activations: QType) -> int:
        """See :class:`Scheme`."""
        return activation_group(self.type, activations)

    def to_dict(self) -> dict[str, Any]:
        """See :class:`Scheme`."""
        return {
            "kind": self.kind,
            "qtype": self.qtype,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
        }

    def __str__(self) -> str:
        group = "" if self.group_size == PER_CHANNEL else f" g{self.group_size}"
        return f"{self.qtype}{group}{'' if self.symmetric else ' asym'}"

    def _group_sizes(self) -> tuple[int, ...]:
        return (PER_CHANNEL, *GROUP_SIZES)

    def _may_have_zero(self) -> bool:
        return False


@dataclass(frozen=True)
class Affine(Grouped):
    """Integers: w = code * scale, or (code - zero) * scale. int8 is symmetric only."""

    kind: ClassVar[str] = "affine"
    qtypes: ClassVar[tuple[str, ...]] = ("int2", "int4", "int8")

    def _may_have_zero(self) -> bool:
        return self.type.is_packed


@dataclass(frozen=True)
class Float8(Grouped):
    """8-bit floats times one scale per row: w = float(code) * scale."""

    kind: ClassVar[str] = "float8"
    qtypes: ClassVar[tuple[str, ...]] = ("float8_e4m3fn", "float8_e5m2")

    def _group_sizes(self) -> tuple[int, ...]:
        return (PER_CHANNEL,)


@dataclass(frozen=True)
class Lookup(Grouped):
    """A table of 16 values times a scale: w = table[code] * scale, for nf4 and fp4."""

    kind: ClassVar[str] = "lookup"
    qtypes: ClassVar[tuple[str, ...]] = ("nf4", "fp4")


def _or(values: tuple[Any, ...]) -> str:
    return ", ".join(map(str, values[:-1])) + f" or {values[-1]}" if len(values) > 1 else str(values[0])
