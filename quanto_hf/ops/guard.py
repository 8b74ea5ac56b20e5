"""Whether a call that knows addresses in memory may run: its arguments are plain memory, and its weight has not moved.

A quantized layer calls the same weight again and again. The checks of the weight, the choice of the kernel and the
reading of its tensors happen once; each call then looks at its arguments, and whether the weight is still where it was.
"""

from collections.abc import Callable, Sequence
from functools import cache
from operator import attrgetter
from typing import Any

import torch

from quanto_hf.ops.watched import watched

PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def guarded(
    call: Callable[..., torch.Tensor | None], stored: Sequence[torch.Tensor | None], device: str
) -> Callable[..., torch.Tensor | None]:
    """``call`` with a look at its arguments first: None is answered where it must not run.

    Args:
        call: reads the memory of its arguments and of ``stored``.
        stored: the tensors that it was made for, None aside.
        device: the type of the device that the arguments must be on.
    """
    is_there, unmoved = attrgetter(f"is_{device}"), whereabouts(stored)
    grad, tensor, parameter, dtype = torch.is_grad_enabled, torch.Tensor, torch.nn.Parameter, torch.dtype

    def guard(*args: Any) -> torch.Tensor | None:
        if watched() or not unmoved():
            return None
        followed = grad()
        for arg in args:
            kind = type(arg)
            if kind is tensor or kind is parameter:
                if not is_there(arg) or not arg.is_contiguous() or arg.is_neg() or (followed and arg.requires_grad):
                    return None
            elif arg is not None and kind is not dtype:
                # neither a bias that there is not, nor the dtype of a result
                return None
        return call(*args)

    return guard


def whereabouts(stored: Sequence[torch.Tensor | None]) -> Callable[[], bool]:
    """A function that says whether these tensors, None aside, still are the memory that they are now. Another tensor
    may come behind the same Parameter: ``param.data = ...``, as offload does.

    Parameters that tell this themselves, by another ``place`` (``quanto_hf.nn.stored``), are asked for it first: every
    other attribute takes torch 0.1 us to read of a tensor whose type is neither Tensor nor Parameter. The memory behind
    the same place may still move as a whole (share_memory, storages that are resized).
    """
    held: list[Any] = [tensor for tensor in stored if tensor is not None]
    facts = [(tensor, tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in held]

    def as_they_were(facts: list[Any] = facts) -> bool:
        for tensor, at, shape, dtype in facts:
            if (
                tensor.data_ptr() != at
                or tensor.shape != shape
                or tensor.dtype is not dtype
                or not tensor.is_contiguous()
            ):
                return False
        return True

    places = [(tensor, tensor.place, tensor.data_ptr()) for tensor in held if hasattr(tensor, "place")]
    others = [fact for fact in facts if not hasattr(fact[0], "place")]
    if not places:
        return as_they_were

    def unmoved() -> bool:
        try:
            for tensor, place, at in places:
                if tensor.place is not place or tensor.data_ptr() != at:
                    break
            else:
                return not others or as_they_were(others)
            if not as_they_were():
                return False
            # moved back
            places[:] = [(tensor, tensor.place, at) for tensor, _, at in places]
            return True
        except AttributeError:
            # torch has swapped one for another type of tensor
            return as_they_were()

    return unmoved


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a kernel can read it as it lies."""
    return _has_memory(type(tensor)) and tensor.is_contiguous() and not tensor.is_neg()


@cache
def _has_memory(kind: type[torch.Tensor]) -> bool:
    """Whether tensors of a type are memory of their own, and nothing else: those of :mod:`quanto_hf.nn.stored` are."""
    return kind in PLAIN or hasattr(kind, "place")
