"""Schemes in which neighbouring columns of a row share a scale: integers, 8-bit floats and tables."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from quanto_hf.fit import Fit, Grid, fit_by_name
from quanto_hf.ops import GroupedWeight, activation_group, groups, packed_width
from quanto_hf.ops.decode import decode_reference
from quanto_hf.qtypes import QTYPES, QType
from quanto_hf.schemes.base import Scheme, Tensors, TensorSpec
from quanto_hf.schemes.given import encode, fake_quantize
from quanto_hf.schemes.quantizing import quantize_rows

GROUP_SIZES = (16, 32, 64, 128, 256)
PER_CHANNEL = -1


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

    @property
    def names(self) -> tuple[str, ...]:
        """See :class:`Scheme`."""
        return ("packed", "scale") if self.symmetric else ("packed", "scale", "zero")

    @property
    def signed_scales(self) -> bool:
        """See :class:`Scheme`: symmetric int4 and int2, whose grids are -8 to 7 and -2 to 1."""
        return self.type.kind == "int" and -self.grid.lowest > self.grid.highest

    def refuses_fit(self, fit: "Fit | str | None" = None) -> str | None:
        """See :class:`Scheme`.

        Example:
            >>> Affine("int8").refuses_fit("mse") is None, Affine("int8").refuses_fit("hqq")
            (True, "fit='hqq' moves the zero, and symmetric int8 weights have none; ...")
        """
        try:
            return None if fit is None else fit_by_name(fit).refuses(self.grid)
        except ValueError as error:
            return str(error)

    def refuses_learning(self) -> str | None:
        """See :class:`Scheme`: all can."""
        return None

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
        if weight.numel() == 0 or weight.device.type == "meta":
            return result
        flat = weight.detach().reshape(-1, columns)
        parts = {name: tensor.view(flat.shape[0], -1) for name, tensor in result.items()}
        quantize_rows(self, flat, found, self.weight(parts, columns))
        return result

    def encode(
        self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """See :class:`Scheme`."""
        return encode(self, weight, scale, zero)

    def fake_quantize(
        self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See :class:`Scheme`."""
        return fake_quantize(self, weight, scale, zero)

    def weight(self, tensors: Tensors, in_features: int) -> GroupedWeight:
        """See :class:`Scheme`."""
        packed, scale, zero = tensors["packed"], tensors["scale"], tensors.get("zero")
        return GroupedWeight(packed, scale, zero, self.qtype, self.group_size, in_features)

    def at_ends(self, tensors: Tensors, in_features: int) -> torch.Tensor:
        """See :class:`Scheme`."""
        numbers = decode_reference(tensors["packed"], self.type, in_features)
        # packed integers are stored without a sign
        unsigned = self.type.kind == "int" and self.type.is_packed
        low, high = (0, self.type.levels - 1) if unsigned else (self.type.qmin, self.type.qmax)
        return (numbers <= low) | (numbers >= high)

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
