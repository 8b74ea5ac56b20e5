"""Additive quantization: each block of a weight is a sum of codebook entries, times the scale of its rows."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from quanto_hf.fit import NO_CONTEXT, AnyFit, Context
from quanto_hf.fit.aqlm import Layout, quantize_aqlm
from quanto_hf.fit.aqlm.loops import runs_native
from quanto_hf.fit.aqlm.memory import fit_bytes
from quanto_hf.fit.aqlm.work import products, products_per_second
from quanto_hf.ops import AqlmWeight, code_dtype
from quanto_hf.schemes.base import Scheme, register_scheme
from quanto_hf.schemes.books import TrainableBooks
from quanto_hf.schemes.stored import Tensors, TensorSpec, Trainable

# "aqlm-2x8": 2 codebooks, codes of 8 bits.
NAME = re.compile(r"aqlm-([1-9]\d*)x([1-9]\d*)")
IN_GROUP = 8
# Bits per weight of codebooks that are worth a note. The published 1x16 has 0.5 at 4096 x 4096, and 8 at 1024 x 1024.
COSTLY = 0.5


@register_scheme
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
    # the published ones
    examples: ClassVar[tuple[str, ...]] = ("aqlm-1x8", "aqlm-2x8", "aqlm-1x16")
    spelling: ClassVar[str] = "aqlm-KxB"

    def __post_init__(self) -> None:
        _ = self.layout

    @property
    def layout(self) -> Layout:
        """How a weight is cut into blocks."""
        return Layout(self.num_codebooks, self.nbits, self.out_group, self.in_group)

    @classmethod
    def knows(cls, name: str) -> bool:
        """Whether a name has the form aqlm-KxB.

        Example:
            >>> Aqlm.knows("aqlm-1x16"), Aqlm.knows("int4"), Aqlm.knows("aqlm-0x8")
            (True, False, False)
        """
        return NAME.fullmatch(name) is not None

    @classmethod
    def named(cls, name: str, group_size: int | None = None, symmetric: bool | None = None) -> "Aqlm":
        """The scheme of a name: blocks of one row and ``group_size`` columns, 8 by default."""
        found = NAME.fullmatch(name)
        assert found is not None
        if symmetric is False:
            raise ValueError(f"{name} weights have no zero: leave out symmetric=False")
        return cls(int(found[1]), int(found[2]), 1, IN_GROUP if group_size is None else group_size)

    @classmethod
    def refuses_group_size(cls, name: str, group_size: Any) -> str | None:
        """Why ``group_size`` is refused, or None: any whole number of columns may share a code."""
        if type(group_size) is int and group_size >= 1:
            return None
        return (
            f"group_size={group_size!r}, which is in_group={group_size!r} of {name} weights, does not work; choose "
            "a whole number above 0"
        )

    def asked(self) -> dict[str, Any]:
        return {"weights": f"aqlm-{self.num_codebooks}x{self.nbits}", "group_size": self.in_group}

    @property
    def names(self) -> tuple[str, ...]:
        return ("codes", "codebooks", "scales")

    @property
    def float_names(self) -> tuple[str, ...]:
        return ("codebooks", "scales")

    def refuses_fit(self, fit: AnyFit = None) -> str | None:
        """Why a weight cannot be made, or None: a fit is given, or codes have more bits than can be fitted.

        Example:
            >>> Aqlm(1, 20).refuses_fit()
            'aqlm 1x20 g8 weights can be read, but not made: nbits=20 is out of range; choose 1 to 16'
        """
        if fit is not None:
            return f"fit={fit!r} is not for {self} weights, which AQLM fits itself; leave it out"
        reason = self.layout.refuses()
        return None if reason is None else f"{self} weights can be read, but not made: {reason}"

    def refuses_training(self) -> str | None:
        return "fitting takes seconds"

    def wants_moments(self, fit: AnyFit = None) -> bool:
        """Always: with second moments the error of the outputs is made small. At 2 bits that halves it."""
        return True

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) != 2:
            return f"{self} weights have 2 dimensions"
        for what, size, group in (("out_features", shape[0], self.out_group), ("in_features", shape[1], self.in_group)):
            if size % group:
                return f"{what}={size} is not a multiple of the {group} that share a code of {self} weights"
        return None

    def tensors(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, TensorSpec]:
        """Names, shapes and dtypes of the stored tensors.

        Returns:
            ``codes``: the smallest signed integers with ``nbits`` bits, shape (rows / out_group, columns / in_group,
            K); ``codebooks``: ``dtype``, shape (K, 2**nbits, out_group, in_group); ``scales``: ``dtype``, shape
            (rows / out_group, 1, 1, 1).

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

    def candidates(self, stored: Mapping[str, TensorSpec]) -> list[TensorSpec]:
        """The weight with these tensors: codes give its shape, codebooks its dtype. One or none."""
        codes, books = stored.get("codes"), stored.get("codebooks")
        if codes is None or len(codes.shape) != 3:
            return []
        is_float = books is not None and getattr(books.dtype, "is_floating_point", False)
        shape = codes.shape[0] * self.out_group, codes.shape[1] * self.in_group
        return [TensorSpec(shape, books.dtype if books is not None and is_float else torch.bfloat16)]

    def codebook_bits(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float16) -> float:
        """Bits per weight of the codebooks alone, which do not get smaller with the layer."""
        return 8 * self.tensors(shape, dtype)["codebooks"].nbytes / (shape[0] * shape[1])

    @classmethod
    def notes(cls, layers: Mapping[str, tuple["Aqlm", Mapping[str, TensorSpec]]]) -> tuple[str, ...]:
        """A sentence about codebooks that take more than half a bit per weight. They have the same size in a small
        layer as in a large one.

        Example:
            >>> scheme = Aqlm(1, 16)
            >>> print(*Aqlm.notes({"fc": (scheme, scheme.tensors((1024, 1024), torch.float16))}))
            the codebooks of 1 AQLM layer take more than 0.5 bits per weight, at most 8.0 (fc: 10.02 bits in all); ...
        """
        weights = {
            name: (scheme, found[0])
            for name, (scheme, stored) in layers.items()
            if (found := scheme.candidates(stored)) and 0 not in found[0].shape
        }
        costs = {name: scheme.codebook_bits(spec.shape, spec.dtype) for name, (scheme, spec) in weights.items()}
        costly = [name for name, bits in costs.items() if bits > COSTLY]
        if not costly:
            return ()
        worst = max(costly, key=costs.__getitem__)
        scheme, spec = weights[worst]
        return (
            f"the codebooks of {len(costly)} AQLM layer{'s' * (len(costly) > 1)} take more than {COSTLY} bits per "
            f"weight, at most {costs[worst]:.1f} ({worst}: {scheme.bits(spec.shape, spec.dtype):.2f} bits in all); "
            f"fewer bits per code make smaller codebooks, and small layers may stay float",
        )

    def quantize(
        self, weight: torch.Tensor, fit: AnyFit = None, context: Context = NO_CONTEXT
    ) -> dict[str, torch.Tensor]:
        """The stored tensors: codebooks, scales and codes are fitted together.

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
            **asdict(self),
            hessian=context.moment,
            seed=context.seed,
            iterations=context.iterations,
            progress=context.progress,
        )
        return made._asdict()

    def workspace_bytes(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        fit: AnyFit = None,
        *,
        device: str = "cpu",
        calibrated: bool = False,
    ) -> int:
        """Most bytes of temporaries, within a few percent of what was measured."""
        if not shape[0] or not shape[1]:
            return 0
        return fit_bytes(shape, self.layout, dtype, calibrated=calibrated, native=runs_native(torch.device(device)))

    def work(self, shape: tuple[int, int], calibrated: bool = False) -> float:
        """Multiplications of two numbers."""
        return products(shape, self.layout, calibrated)

    def speed(self, calibrated: bool = False) -> float | None:
        """Multiplications per second, measured on a random weight in 0.1 to 0.3 s."""
        return products_per_second(self.layout, calibrated)

    def trainable(self, tensors: Tensors) -> Trainable | None:
        """Codebooks and scales."""
        return TrainableBooks(tensors, self.layout)

    def weight(self, tensors: Tensors, in_features: int) -> AqlmWeight:
        return AqlmWeight(tensors["codes"], tensors["codebooks"], tensors["scales"])

    def __str__(self) -> str:
        rows = "" if self.out_group == 1 else f" x {self.out_group} rows"
        return f"aqlm {self.num_codebooks}x{self.nbits} g{self.in_group}{rows}"
