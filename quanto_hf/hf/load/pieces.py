"""A float parameter that comes in pieces along its first dimension, each made when it is asked for."""

from collections.abc import Iterable, Iterator
from itertools import chain

import torch


class Pieces:
    """Pieces along the first dimension of a parameter, in their order. They can be taken once.

    Args:
        pieces: makes each piece when it is asked for.
    """

    def __init__(self, pieces: Iterable[torch.Tensor]) -> None:
        self._pieces = iter(pieces)

    def first(self) -> torch.Tensor:
        """The first piece, which stays.

        Raises:
            ValueError: there are none.
        """
        found = next(self._pieces, None)
        if found is None:
            raise ValueError("the checkpoint has none of the tensors that are to be merged")
        self._pieces = chain((found,), self._pieces)
        return found

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self._pieces
