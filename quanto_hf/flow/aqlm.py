"""The verb for models with additive codes, by its older name."""

import os
from collections.abc import Iterable
from typing import Any

from torch import nn

from quanto_hf.flow.making import MOMENT_BYTES, make_layers, waiting_layers


def freeze_aqlm(
    model: nn.Module,
    data: Iterable[Any] | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    iterations: int | None = None,
    moment_bytes: int = MOMENT_BYTES,
    progress: bool = True,
) -> nn.Module:
    """:func:`quanto_hf.freeze` for the layers of a model that are to be AQLM, and no others.

    With ``data`` the errors of the layers' outputs are made small, not those of the weights: for 2 bits that halves
    them.

    Args:
        model: after ``quantize(model, "aqlm-2x8")``.
        data: see :func:`quanto_hf.freeze`, as all that follow.
        folder: see there.
        seed: see there.
        iterations: see there.
        moment_bytes: see there.
        progress: see there.

    Returns:
        The model itself.

    Raises:
        ValueError: no layer is to be AQLM, or as of :func:`quanto_hf.freeze`.

    Example:
        >>> from quanto_hf.flow import quantize
        >>> model = quantize(nn.Sequential(nn.Linear(64, 32)), "aqlm-2x4")
        >>> freeze_aqlm(model, [torch.randn(100, 64)], progress=False)[0].scheme
        Aqlm(num_codebooks=2, nbits=4, out_group=1, in_group=8)
    """
    layers = {name: m for name, m in waiting_layers(model).items() if m.scheme.kind == "aqlm"}
    if not layers:
        raise ValueError("no layer of this model waits to be AQLM; quantize(model, 'aqlm-2x8') comes first")
    make_layers(
        model, layers, data,
        folder=folder, seed=seed, iterations=iterations, moment_bytes=moment_bytes, progress=progress,
    )  # fmt: skip
    return model
