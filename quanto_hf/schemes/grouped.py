"""Schemes in which neighbouring columns of a row share a scale."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from quanto_hf.fit import BFLOAT16, FLOAT32, AnyFit, Fit, Grid, ScaleType, fit_by_name
from quanto_hf.ops import GroupedWeight, activation_group, groups, packed_width, row_lengths
from quanto_hf.ops.decode import decode_reference
from quanto_hf.qtypes import QTYPES, QType, qtype
from quanto_hf.schemes import given, quantizing
from quanto_hf.schemes.base import Scheme
from quanto_hf.schemes.making import any_of
from quanto_hf.schemes.stored import Tensors, TensorSpec

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

    # QType.kind of its number types
    numbers: ClassVar[str]

    def __post_init__(self) -> None:
        # what is no text cannot even be looked up
        if not isinstance(self.qtype, str) or self.qtype not in self.qtypes():
            raise ValueError(
                f"{self.qtype!r} is not a type of the {self.kind} scheme; choose {any_of(sorted(self.qtypes()))}"
            )
        # 64.0 is equal to 64, but cuts no tensor; "false" is true
        if type(self.group_size) is not int or self.group_size not in self._group_sizes():
            raise ValueError(
                f"group_size={self.group_size!r} does not work for {self.qtype} weights; choose "
                f"{any_of(self._group_sizes())} (-1 is one scale for the whole row)"
            )
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric={self.symmetric!r} is not known; choose True or False")
        if not self.symmetric and not self._may_have_zero():
            raise ValueError(f"{self.qtype} weights are symmetric: leave out symmetric=False")

    @classmethod
    def qtypes(cls) -> tuple[str, ...]:
        """Names of its number types."""
        return tuple(name for name, kind in QTYPES.items() if kind.kind == cls.numbers)

    @classmethod
    def knows(cls, name: str) -> bool:
        try:
            return qtype(name).name in cls.qtypes()
        except ValueError:
            return False

    @classmethod
    def named(cls, name: str, group_size: int | None = None, symmetric: bool | None = None) -> "Grouped":
        kind = qtype(name)
        return cls(
            kind.name,
            kind.group_size if group_size is None else group_size,
            kind.symmetric if symmetric is None else symmetric,
        )

    @classmethod
    def refuses_group_size(cls, name: str, group_size: Any) -> str | None:
        """Why no number type of the scheme has such groups, or None; one of them may refuse more."""
        sizes = (PER_CHANNEL, *GROUP_SIZES)
        if group_size in sizes:
            return None
        return f"group_size={reprlib.repr(group_size)}; choose one of {', '.join(map(str, sizes))}"

    def asked(self) -> dict[str, Any]:
        return {"weights": self.qtype, "group_size": self.group_size, "symmetric": self.symmetric}

    @property
    def type(self) -> QType:
        """The number type."""
        return QTYPES[self.qtype]

    @property
    def grid(self) -> Grid:
        """The numbers that codes can stand for."""
        return Grid(self.type, self.symmetric)

    @property
    def scale_type(self) -> ScaleType:
        """How scales and zeros are stored: float32 for the few scales of whole rows; bfloat16, which has the range of
        float32, for groups."""
        return FLOAT32 if self.group_size == PER_CHANNEL else BFLOAT16

    @property
    def names(self) -> tuple[str, ...]:
        return ("packed", "scale") if self.symmetric else ("packed", "scale", "zero")

    @property
    def signed_scales(self) -> bool:
        """True for symmetric int4 and int2, whose grids are -8 to 7 and -2 to 1."""
        return self.type.kind == "int" and -self.grid.lowest > self.grid.highest

    def refuses_fit(self, fit: AnyFit = None) -> str | None:
        """Why the fit finds no scales of this grid, or None.

        Example:
            >>> from quanto_hf.schemes import Affine
            >>> Affine("int8").refuses_fit("mse") is None, Affine("int8").refuses_fit("hqq")
            (True, "fit='hqq' moves the zero, and symmetric int8 weights have none; ...")
        """
        try:
            return None if fit is None else fit_by_name(fit).refuses(self.grid)
        except ValueError as error:
            return str(error)

    def refuses_learning(self) -> str | None:
        """None: scales of groups can be trained."""
        return None

    def wants_moments(self, fit: AnyFit = None) -> bool:
        """Whether the fit does."""
        return self.fit_of(fit).wants_moments

    def tensors(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Names, shapes and dtypes of the stored tensors.

        Returns:
            ``packed``: codes, ``QType.storage``, shape (..., rows, ``ops.packing.packed_width(columns, bits)``);
            ``scale``: ``scale_type.dtype``, shape (..., rows, groups); if asymmetric ``zero``: as ``scale``, in units
            of codes.
        """
        *rows, columns = shape
        scale = TensorSpec((*rows, groups(columns, self.group_size)), self.scale_type.dtype)
        specs = {
            "packed": TensorSpec((*rows, packed_width(columns, self.type.bits)), self.type.storage),
            "scale": scale,
        }
        if not self.symmetric:
            specs["zero"] = scale
        return specs

    def candidates(self, stored: Mapping[str, TensorSpec]) -> list[TensorSpec]:
        """One per number of columns, as the last byte of a row may be partly used. The dtype is not known: bfloat16."""
        packed = stored.get("packed")
        if packed is None or len(packed.shape) < 2:
            return []
        widths = row_lengths(packed.shape[-1], self.type.bits)
        return [TensorSpec((*packed.shape[:-1], columns), torch.bfloat16) for columns in widths]

    def default_fit(self) -> Fit:
        """The best fit that needs no data, by KL on the bundled model and cosine on MiniLM; see docs/accuracy.md."""
        return fit_by_name(self.type.fit)

    def fit_of(self, fit: AnyFit) -> Fit:
        """The fit of a name; None is the default."""
        return self.default_fit() if fit is None else fit_by_name(fit)

    quantize = quantizing.quantize
    workspace_bytes = quantizing.workspace_bytes
    encode = given.encode
    fake_quantize = given.fake_quantize

    def scaled(self, tensors: Tensors, factor: float) -> dict[str, torch.Tensor] | None:
        kind, scale = self.scale_type, tensors["scale"]
        made = kind.store(kind.read(scale) * factor)
        exact = torch.equal(kind.read(made) / factor, kind.read(scale))
        return {"scale": made} if exact else None

    def read_scale(self, stored: torch.Tensor) -> torch.Tensor:
        return self.scale_type.read(stored)

    def weight(self, tensors: Tensors, in_features: int) -> GroupedWeight:
        """The value that the ops take. Its scales are floats, whatever the stored ones are."""
        packed, scale, zero = tensors["packed"], tensors["scale"], tensors.get("zero")
        if not self.scale_type.is_float:
            scale, zero = self.scale_type.read(scale), None if zero is None else self.scale_type.read(zero)
        return GroupedWeight(packed, scale, zero, self.qtype, self.group_size, in_features)

    def at_ends(self, tensors: Tensors, in_features: int) -> torch.Tensor:
        numbers = decode_reference(tensors["packed"], self.type, in_features)
        # packed integers are stored without a sign
        unsigned = self.type.kind == "int" and self.type.is_packed
        low, high = (0, self.type.levels - 1) if unsigned else (self.type.qmin, self.type.qmax)
        return (numbers <= low) | (numbers >= high)

    def activation_group(self, activations: QType) -> int:
        return activation_group(self.type, activations)

    def __str__(self) -> str:
        group = "" if self.group_size == PER_CHANNEL else f" g{self.group_size}"
        return f"{self.qtype}{group}{'' if self.symmetric else ' asym'}"

    def _group_sizes(self) -> tuple[int, ...]:
        return (PER_CHANNEL, *GROUP_SIZES)

    def _may_have_zero(self) -> bool:
        return False
