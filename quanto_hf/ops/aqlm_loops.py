"""The loops that make additive codebooks, for devices that have them natively.

They are no op: what they do is defined in :mod:`quanto_hf.fit.aqlm`, which compares them with its own before their
first use.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from quanto_hf.ops.kernel import reference_only

# Sets of codes that a search keeps at most (csrc/aqlm_fit.h).
MAX_BEAM = 64


class Loops(NamedTuple):
    """The loops of a device.

    Args:
        refuses: returns why they cannot be used, or None.
        label: names them in a warning, with what their results depend on.
        search: as of :func:`quanto_hf.fit.aqlm.search.search`.
        sweep: as of :func:`quanto_hf.fit.aqlm.sweep.sweep`.
        product: ``a @ b``, equal to the last bit for any number of threads.
        code_sums: as of :func:`quanto_hf.fit.aqlm.loops.torch_code_sums`.
    """

    refuses: Callable[[], str | None]
    label: Callable[[], str]
    search: Callable[..., None]
    sweep: Callable[..., None]
    product: Callable[..., torch.Tensor]
    code_sums: Callable[..., tuple[torch.Tensor, torch.Tensor]]


LOOPS: dict[str, Loops] = {}


def refuses_loops(device: torch.device) -> str | None:
    """Why additive codebooks are not made natively for tensors of this device, or None."""
    asked = reference_only()
    found: Any = LOOPS.get(device.type)
    if found is None:
        return f"there are native loops for {', '.join(LOOPS)} only"
    said: str | None = found.refuses()
    return said or ("QUANTO_HF_REFERENCE is set" if asked else None)
