"""Models that scale their own weights while they run, and would scale them again after a reload."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def scaled_back(model: Any) -> Iterator[None]:
    """Give RWKV, which divides weights by powers of two in eval mode, meanwhile the weights that it was loaded with:
    weights that are saved divided would be divided once more after a reload. (The float model has that fault.)

    Args:
        model: any model.
    """
    parts = [m for m in model.modules() if getattr(m, "layers_are_rescaled", False) and hasattr(m, "_rescale_layers")]
    modes = [part.training for part in parts]

    def rescale(training: bool) -> None:
        for part, mode in zip(parts, modes, strict=True):
            part.training = training
            part._rescale_layers()
            part.training = mode

    rescale(training=True)
    try:
        yield
    finally:
        rescale(training=False)
