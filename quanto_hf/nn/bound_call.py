"""A call that is bound to stored tensors, and whether a module still holds these."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch

Call = Callable[..., torch.Tensor | None]
Parameters = Mapping[str, torch.Tensor | None]


class BoundCall(NamedTuple):
    """A call with everything about some tensors looked up in advance, as :meth:`quanto_hf.schemes.Scheme.bind` and the
    like make it, or that there is none. Others under the names of these want another call; that other data came behind
    the same tensor, the call sees itself. It knows addresses in memory, and must not be copied with a module.
    """

    call: Call | None
    held: tuple[tuple[str, torch.Tensor | None], ...]
    # the static scale of the input, which may be a buffer
    input_scale: torch.Tensor | None = None

    @staticmethod
    def holding(names: Iterable[str], parameters: Parameters) -> tuple[tuple[str, torch.Tensor | None], ...]:
        """What is held under these names now."""
        return tuple((name, parameters.get(name)) for name in names)

    def fits(self, parameters: Parameters) -> bool:
        """Whether the same tensors are held. Each layer of each token asks: a loop, which costs half of ``any``."""
        for name, tensor in self.held:
            if parameters.get(name) is not tensor:
                return False
        return True
