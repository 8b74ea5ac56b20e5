"""Numbers that choose rows or experts: checked before any memory is read."""

import torch

from quanto_hf.ops.watched import watched


def check_index(index: torch.Tensor, size: int, what: str, whole: str) -> None:
    """Raise IndexError unless every number is one of 0, 1, ... ``size - 1``.

    Only where the numbers can be read, and reading them waits for nothing: in ordinary tensors on the CPU. There is no
    number to read in a fake tensor, and on a GPU torch's own indexing checks them.

    Args:
        index: integers, any shape.
        size: how many there are to choose from.
        what: names one of them, such as "row".
        whole: names what has them, such as "the weight".
    """
    if not index.numel() or not index.is_cpu or watched() or type(index) is not torch.Tensor:
        return
    low, high = torch.aminmax(index.detach().to(torch.int64))
    worst = int(low) if low < 0 else int(high)
    if not 0 <= worst < size:
        there = f"0 to {size - 1}" if size else "none"
        raise IndexError(f"{what} {worst} does not exist: {whole} has {size} of them, {there}")
