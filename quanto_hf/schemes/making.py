"""How the stored tensors of a scheme are made from a float weight, and what a scheme refuses to make."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from quanto_hf.fit import NO_CONTEXT, AnyFit, Context
from quanto_hf.qtypes import common_names
from quanto_hf.schemes.stored import Tensors, Trainable


def with_scales() -> str:
    """The number types of weights that have a scale for each group, for errors."""
    return any_of(common_names())


def any_of(values: Sequence[Any]) -> str:
    """Values in words: "1, 2 or 3"."""
    return ", ".join(map(str, values[:-1])) + f" or {values[-1]}" if len(values) > 1 else str(values[0])


class Making(ABC):
    """The part of :class:`quanto_hf.schemes.Scheme` that makes weights. What is refused is asked before anything is
    changed, and said in one sentence."""

    @property
    def signed_scales(self) -> bool:
        """Whether scales may be negative: the numbers of the type reach further down than up, and the sign of a scale
        says to which side the longer one points."""
        return False

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be stored, or None."""
        return None

    def refuses_fit(self, fit: AnyFit = None) -> str | None:
        """Why no float weight can be quantized so, in one sentence, or None. It is asked before a model is changed.

        Args:
            fit: of :meth:`quantize`.
        """
        return None

    def refuses_training(self) -> str | None:
        """Why weights cannot be rounded in every step of training, or None."""
        return None

    def refuses_learning(self) -> str | None:
        """Why scales cannot be trained, in one sentence, or None."""
        return f"{self} weights have no scales that can be learned; leave out learn_scales, or choose {with_scales()}"

    def wants_moments(self, fit: AnyFit = None) -> bool:
        """Whether :meth:`quantize` with this fit makes use of ``Context.moment``."""
        return False

    @abstractmethod
    def quantize(
        self, weight: torch.Tensor, fit: AnyFit = None, context: Context = NO_CONTEXT
    ) -> dict[str, torch.Tensor]:
        """The stored tensors of a float weight, on its device.

        Args:
            weight: float32, bfloat16 or float16, shape (..., out_features, in_features).
            fit: what finds scale and zero; None is the default of the scheme.
            context: what is known besides the weight: second moments of the inputs, a seed, who is told of progress.

        Raises:
            ValueError: the weight has NaN or infinite values, or no columns.
        """

    def workspace_bytes(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        fit: AnyFit = None,
        *,
        device: str = "cpu",
        calibrated: bool = False,
    ) -> int:
        """Most bytes of temporaries that :meth:`quantize` takes besides the weight, its second moment and the result;
        0 where that is a few MB.

        Args:
            shape: of the weight, (out_features, in_features).
            dtype: of the weight.
            fit: of :meth:`quantize`.
            device: type of the device: "cpu", "cuda".
            calibrated: whether a second moment is given.
        """
        return 0

    def work(self, shape: tuple[int, int], calibrated: bool = False) -> float:
        """How much there is to do to quantize a weight, in a unit of the scheme: for bars of progress."""
        return float(prod(shape))

    def speed(self, calibrated: bool = False) -> float | None:
        """How much of :meth:`work` this machine does in a second, measured now; None: so much that it does not
        count."""
        return None

    def trainable(self, tensors: Tensors) -> "Trainable | None":
        """What of a stored weight can be trained by gradient while its codes stay, or None: nothing."""
        return None

    def encode(
        self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The stored tensors of a float weight with scales that are given, and not found by a fit.

        Args:
            weight: float, shape (..., out_features, in_features).
            scale: in the shape of the stored one, finite, and not 0 once it is rounded to its stored dtype, which is
                done first. Positive, but for schemes with :attr:`signed_scales`.
            zero: as ``scale``, of asymmetric schemes.

        Raises:
            ValueError: scales do not fit, or the scheme has none.
        """
        raise ValueError(f"{self} weights have no scales that can be given; choose {with_scales()}")

    def read_scale(self, stored: torch.Tensor) -> torch.Tensor:
        """The float32 numbers of a stored scale or zero, of schemes whose scales can be learned."""
        return stored.float()

    def fake_quantize(
        self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The numbers that :meth:`encode` stores, as float32, with gradients to weight, scale and zero.

        Args:
            weight: float, shape (out_features, in_features).
            scale: as of :meth:`encode`.
            zero: as of :meth:`encode`.

        Raises:
            ValueError: as of :meth:`encode`.
        """
        raise ValueError(self.refuses_learning())
