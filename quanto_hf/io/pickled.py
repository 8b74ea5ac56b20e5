"""What a checkpoint of torch.save holds, without its data."""

import pickle
from collections.abc import Iterable
from os import PathLike

import torch

from quanto_hf.schemes import TensorSpec


def read_pickled_headers(files: Iterable[str | PathLike[str]]) -> dict[str, TensorSpec] | None:
    """Name -> shape and dtype of every tensor in files of torch.save, or None where that cannot be told safely: the
    loader says then what is wrong with them."""
    found: dict[str, TensorSpec] = {}
    for file in files:
        try:
            held = torch.load(file, map_location="meta", weights_only=True, mmap=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
            return None
        if not isinstance(held, dict):
            return None
        specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in held.items() if isinstance(t, torch.Tensor)}
        found.update(specs)
    return found
