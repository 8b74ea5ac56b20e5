"""Tensors that are pages of safetensors files: each file is mapped once, and nothing is copied."""

import threading
from os import PathLike, fspath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from quanto_hf.io.checkpoint import CheckpointError

# From here on products of float matrices add in the same order wherever a tensor lies; torch's own tensors begin so.
ALIGNMENT = 64


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU as it is if it begins at a cache line, else a copy, which does: products with it then have
    the bits of those with a tensor in memory. Files that quanto_hf writes have nearly all tensors at one."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


class MappedFiles:
    """Safetensors files by name, each mapped when it is first wanted. From then on it may be replaced or removed.

    The tensors are views of private mappings. They stay valid when this object is gone, and a file is unmapped when
    no tensor of it is left. Pages that were read are given back by the system when memory is short.
    """

    def __init__(self) -> None:
        self._files: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: Any) -> "MappedFiles":
        # nothing is written through it, and no copy could find a file that was removed
        return self

    def __reduce__(self) -> Any:
        return _map_all, (tuple(self._files),)

    def map(self, file: str | PathLike[str]) -> None:
        """Map a file before a tensor of it is wanted.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        with self._lock:
            self._map(fspath(file))

    def tensor(self, file: str | PathLike[str], name: str) -> torch.Tensor:
        """A tensor of a file, on the CPU.

        Raises:
            CheckpointError: the file is missing or damaged, or has no such tensor.
        """
        path = fspath(file)
        with self._lock:
            try:
                tensor: torch.Tensor = self._map(path).get_tensor(name)
            except SafetensorError as error:
                raise CheckpointError(f"{name} cannot be read from {path}: {error}") from None
        return tensor

    def _map(self, path: str) -> Any:
        try:
            if path not in self._files:
                self._files[path] = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        return self._files[path]


def _map_all(files: tuple[str, ...]) -> MappedFiles:
    """What was pickled: the files that have these names now.

    Raises:
        CheckpointError: one is missing or damaged.
    """
    mapped = MappedFiles()
    for file in files:
        mapped.map(file)
    return mapped
