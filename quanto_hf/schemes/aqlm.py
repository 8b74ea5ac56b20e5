"""Additive quantization: each block of a weight is a sum of codebook entries, times the scale of its rows."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from quanto_hf.fit import Fit
from quanto_hf.fit.aqlm import Layout, quantize_aqlm
from quanto_hf.ops import MAX_BITS, AqlmWeight, code_dtype
from quanto_hf.schemes.base import Scheme, Tensors, TensorSpec

# "aqlm-2x8": 2 codebooks, codes of 8 bits.
NAME = re.compile(r"aqlm-([1-9]\d*)x([1-9]\d*)")
IN_GROUP = 8
# far more than anybody has, and few enough that sizes of tensors are numbers that torch takes
MAX_BOOKS = 1024


@dataclass(frozen=True)
class Aqlm(Scheme):
    """Codes that name one entry in each of K codebooks, for each block of out_group x in_group values.

    Egiazarian et al., "Extreme Compression of Large Language Models via Additive Quantization", 2024,
    https://arxiv.org/abs/2401.06118; the format is that of the ``aqlm`` package. Codebooks and scales have the float
    dtype of the layer.

    Args:
        num_codebooks: K.
        nbits: bits of a code, 1 to 24; a codebook has 2**nbits entries.
        out_group: rows of a block.
        in_group: columns of a block.

    Raises:
        ValueError: a value is not a whole number, or out of range.

    Example:
        >>> scheme = Aqlm(2, 8)
        >>> str(scheme), round(scheme.bits((4096, 4096)), 3), round(scheme.codebook_bits((1024, 1024)), 3)
        ('aqlm 2x8 g8', 2.008, 0.062)
    """

    num_codebooks: int
    nbits: int
    out_group: int = 1
    in_group: int = IN_GROUP

    kind: ClassVar[str] = "aqlm"
    by_rows: ClassVar[bool] = False
    scale_name: ClassVar[str] = "scales"

    def __post_init__(self) -> None:
        for name, most in (("num_codebooks", MAX_BOOKS), ("nbits", MAX_BITS), ("out_group", None), ("in_group", None)):
            value = getattr(self, name)
            if type(value) is not int or value < 1 or (most is not None and value > most):
                there = f"from 1 to {most}" if most else "above 0"
                raise ValueError(f"{name}={value!r} does not work for AQLM weights; choose a whole number {there}")

    @property
    def names(self) -> tuple[str, ...]:
        """See :class:`Scheme`."""
        return ("codes", "codebooks", "scales")

    def refuses_fit(self, fit: "Fit | str | None" = None) -> str | None:
        """See :class:`Scheme`: it takes no fit, and what can be read is more than what can be made.

        Example:
            >>> Aqlm(1, 20).refuses_fit()
            'aqlm 1x20 g8 weights can be read, but not made: nbits=20 is out of range; choose 1 to 16'
        """
        if fit is not None:
            return f"fit={fit!r} is not for {self} weights, which AQLM fits itself; leave it out"
        try:
            Layout(self.num_codebooks, self.nbits, self.out_group, self.in_group)
        except ValueError as error:
            return f"{self} weights can be read, but not made: {error}"
        return None

    def refuses_training(self) -> str | None:
        """See :class:`Scheme`."""
        return "fitting takes seconds"

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """See :class:`Scheme`."""
        if len(shape) != 2:
            return f"{self} weights have 2 dimensions"
        for what, size, group in (("out_features", shape[0], self.out_group), ("in_features", shape[1], self.in_group)):
            if size % group:
                return f"{what}={size} is not a multiple of the {group} that share a code of {self} weights"
        return None

    def tensors(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, TensorSpec]:
        """See :class:`Scheme`: ``codes``, ``codebooks`` and ``scales``.

        Raises:
            ValueError: :meth:`refuses` has a reason.
        """
        if (reason := self.refuses(shape)) is not None:
            raise ValueError(reason)
        lines = shape[0] // self.out_group
        return {
            "codes": TensorSpec((lines, shape[1] // self.in_group, self.num_codebooks), code_dtype(self.nbits)),
            "codebooks": TensorSpec((self.num_codebooks, 1 << self.nbits, self.out_group, self.in_group), dtype),
            "scales": TensorSpec((lines, 1, 1, 1), dtype),
        }

    def bits(self, shape: tuple[int, int], dtype: torch.dtype = torch.float16) -> float:
        """Bits per weight, codebooks and scales included."""
        return 8 * self.nbytes(shape, dtype) / (shape[0] * shape[1])

    def codebook_bits(self, shape: tuple[int, int], dtype: torch.dtype = torch.float16) -> float:
        """Bits per weight of the codebooks alone, which do not get smaller with the layer."""
        return 8 * self.tensors(shape, dtype)["codebooks"].nbytes / (shape[0] * shape[1])

    def quantize(self, weight: torch.Tensor, fit: "Fit | str | None" = None) -> dict[str, torch.Tensor]:
        """See :class:`Scheme`. Codebooks and codes are fitted together, with a fixed seed; no other fit is known.

        Raises:
            ValueError: the weight cannot be cut into blocks, has NaN or infinite values, or a fit is given.
        """
        if (reason := self.refuses_fit(fit)) is not None:
            raise ValueError(reason)
        if not weight.is_floating_point():
            raise ValueError(f"a weight has a float dtype, but this one has {weight.dtype}")
        self.tensors(tuple(weight.shape), weight.dtype)  # refuses what it cannot store
        made = quantize_aqlm(
            weight.detach(),
            num_codebooks=self.num_codebooks,
            nbits=self.nbits,
            out_group=self.out_group,
            in_group=self.in_group,
        )
        return made._asdict()

    def weight(self, tensors: Tensors, in_features: int) -> AqlmWeight:
        """See :class:`Scheme`."""
        return AqlmWeight(tensors["codes"], tensors["codebooks"], tensors["scales"])

    def to_dict(self) -> dict[str, Any]:
        """See :class:`Scheme`."""
        return {
            "kind": self.kind,
            "num_codebooks": self.num_codebooks,
            "nbits": self.nbits,
            "out_group": self.out_group,
            "in_group": self.in_group,
        }

    def __str__(self) -> str:
        rows = "" if self.out_group == 1 else f" x {self.out_group} rows"
        return f"aqlm {self.num_codebooks}x{self.nbits} g{self.in_group}{rows}"


def is_aqlm_name(weights: Any) -> bool:
    """Whether this is the name of an AQLM layout, such as ``"aqlm-2x8"``.

    Example:
        >>> is_aqlm_name("aqlm-1x16"), is_aqlm_name("int4"), is_aqlm_name("aqlm-0x8")
        (True, False, False)
    """
    return isinstance(weights, str) and NAME.fullmatch(weights) is not None


def aqlm_by_name(weights: str, group_size: int | None = None, symmetric: bool | None = None) -> Aqlm:
    """The scheme of a name such as ``"aqlm-2x8"``, with blocks of one row.

    Args:
        group_size: columns of a block; None is 8.

    Raises:
        ValueError: a value is out of range, or the scheme is asked to be asymmetric.
    """
    found = NAME.fullmatch(weights)
    assert found is not None
    if symmetric is False:
        raise ValueError(f"{weights} weights have no zero: leave out symmetric=False")
    return Aqlm(int(found[1]), int(found[2]), 1, IN_GROUP if group_size is None else group_size)
