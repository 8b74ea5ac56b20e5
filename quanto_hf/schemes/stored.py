"""The stored tensors of a weight: what describes one, and what trains the numbers behind them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

# the stored tensors of one weight, by the names of its scheme
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return prod(self.shape) * self.dtype.itemsize


class Trainable(ABC):
    """Float values behind a stored weight, while they are trained."""

    # what an optimizer trains: float32, with gradients
    values: Sequence[torch.Tensor]

    @abstractmethod
    def weight(self) -> torch.Tensor:
        """The weight that they stand for, float32, shape (out_features, in_features), with gradients to them."""

    @abstractmethod
    def store(self) -> None:
        """Write them into the stored tensors, rounded to their dtypes."""
