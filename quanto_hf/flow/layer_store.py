"""A folder with one file for each layer that is finished, so that work of hours goes on where it ended."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from quanto_hf.io.safe_files import replacing

# Bumped when the same settings give other tensors.
VERSION = 1


def digest(tensors: Iterable[torch.Tensor], *settings: Any) -> str:
    """The SHA-256 of tensors, with their dtypes and shapes, and of settings in JSON types."""
    found = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for tensor in tensors:
        found.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        # empty and 0-dimensional tensors cannot be seen as bytes
        if tensor.numel():
            found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


class LayerStore:
    """Finished layers in a folder. A file counts if it is whole, unchanged, and made from the same.

    Args:
        folder: need not exist; may hold anything else.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def path(self, name: str) -> Path:
        """The file of a layer: its name, and a digest of it, because names may differ in what files cannot."""
        plain = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)[-100:]
        return self.folder / f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.safetensors"

    def read(self, name: str, identity: str) -> dict[str, torch.Tensor] | None:
        """The tensors of a layer, or None.

        Args:
            name: of the layer.
            identity: a digest of everything that decides about them.

        Warns:
            UserWarning: there is a file that does not count; the text says why.
        """
        path = self.path(name)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (SafetensorError, OSError) as error:
            return self._refused(path, f"it cannot be read ({error})")
        if metadata.get("identity") != self._identity(name, identity):
            return self._refused(path, "it was made from another weight, other data or other settings")
        if metadata.get("digest") != _digest(tensors):
            return self._refused(path, "its bytes have been changed")
        return tensors

    def write(self, name: str, identity: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the file of a layer: under another name first, so that there is never half of one.

        Raises:
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        held = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        with replacing(self.path(name)) as temporary:
            save_file(held, temporary, {"identity": self._identity(name, identity), "digest": _digest(held)})

    @staticmethod
    def _identity(name: str, identity: str) -> str:
        return f"{VERSION} {name} {identity}"

    @staticmethod
    def _refused(path: Path, reason: str) -> None:
        warnings.warn(f"{path} is made again: {reason}", stacklevel=4)


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    names = sorted(tensors)
    return digest([tensors[name] for name in names], names)
