"""What a folder for offloaded weights holds: entries that are written once, whole, and never changed.

An entry is a folder of its own, named by a digest of everything that decides about its bytes. So two models, two ways
to quantize one, or two format versions lie side by side, and nothing is ever overwritten that somebody else uses.
"""

import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from quanto_hf.io.checkpoint import read_headers
from quanto_hf.io.formats.quanto import FORMAT_VERSION
from quanto_hf.io.safe_files import file_digest, write_text
from quanto_hf.io.shard_writer import write_shard
from quanto_hf.schemes import TensorSpec

INDEX = "index.json"
PREFIX = "quanto_hf-"
# as save_pretrained splits models nowadays
SHARD_BYTES = 2_000_000_000

Named = Iterable[tuple[str, torch.Tensor]]


class OffloadFolder:
    """One entry of a folder for offloaded weights.

    Args:
        folder: need not exist; may hold anything else.
        settings: everything besides ``specs`` that decides about the bytes, in JSON types.
        specs: name -> shape and dtype of every tensor.
    """

    def __init__(
        self, folder: str | os.PathLike[str], settings: Mapping[str, Any], specs: Mapping[str, TensorSpec]
    ) -> None:
        self.folder, self.specs = Path(folder), dict(specs)
        shapes = {name: [str(spec.dtype), *spec.shape] for name, spec in specs.items()}
        identity = {"format_version": FORMAT_VERSION, "settings": settings, "tensors": shapes}
        self.identity = json.loads(json.dumps(identity))
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        self.path = self.folder / f"{PREFIX}{digest[:16]}"
        self.nbytes = sum(spec.nbytes for spec in specs.values())

    def fill(self, make: Callable[[], Named]) -> dict[str, Path]:
        """Write the entry unless it is there, whole and unchanged.

        Processes that fill the same entry wait for the first one. One that was killed leaves nothing that counts.

        Args:
            make: gives (name, tensor) in the order of ``specs``; each tensor may go once the next one is asked for.

        Returns:
            Name -> file that holds the tensor.

        Raises:
            OSError: the folder cannot be written, or the disk is full. What was there before is still there.
        """
        if self._why_not_complete() is None:
            return self._files
        with self._locked():
            # somebody else may have written it while this process waited
            reason = self._why_not_complete()
            if reason is not None:
                if reason:
                    warnings.warn(f"{self.path} is written again: {reason}", stacklevel=3)
                self._write(make)
        return self._files

    def _why_not_complete(self) -> str | None:
        """None if the entry is complete; an empty string if it has never been; else what happened to it."""
        try:
            text = (self.path / INDEX).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return ""
        try:
            index = json.loads(text)
            if index["identity"] != self.identity:
                return f"its {INDEX} belongs to other weights"
            for name, (size, digest) in index["files"].items():
                file = self.path / name
                if file.stat().st_size != size:
                    return f"{name} has {file.stat().st_size} bytes instead of {size}"
                if file_digest(file) != digest:
                    return f"{name} has been changed"
            self._files = self._locations(index["files"])
        except FileNotFoundError:
            return f"{name} is missing"
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"its {INDEX} is damaged"
        return None if set(self._files) == set(self.specs) else f"its {INDEX} lacks tensors"

    def _locations(self, files: Iterable[str]) -> dict[str, Path]:
        """Tensor -> file, from the files themselves."""
        return {tensor: self.path / file for file in files for tensor in read_headers([self.path / file])}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = FileLock(self.folder / f".{self.path.name}.lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            raise self._cannot_write(error) from None
        try:
            yield
        finally:
            lock.release()

    def _cannot_write(self, error: OSError) -> OSError:
        return OSError(
            error.errno,
            f"{self.nbytes:,} bytes cannot be written to the offload folder {self.folder}: {error.strerror or error}",
        )

    def _write(self, make: Callable[[], Named]) -> None:
        # What does not count takes space. Who has mapped a file of it keeps that.
        shutil.rmtree(self.path, ignore_errors=True)
        free = shutil.disk_usage(self.folder).free
        if free < self.nbytes:
            raise OSError(
                errno.ENOSPC,
                f"the offload folder {self.folder} needs {self.nbytes:,} bytes, but its disk has {free:,} left",
            )
        try:
            self.path.mkdir()
            files: dict[str, tuple[int, str]] = {}
            tensors = iter(make())
            parts = _split(self.specs)
            for i, part in enumerate(parts):
                name = f"weights-{i + 1:05}-of-{len(parts):05}.safetensors"
                metadata = {"format": "pt", "quanto_hf_format": str(FORMAT_VERSION)}
                write_shard(self.path / name, part, islice(tensors, len(part)), metadata)
                files[name] = ((self.path / name).stat().st_size, file_digest(self.path / name))
            self._files = self._locations(files)
            # the index is what makes an entry: without it the rest is nothing
            write_text(self.path / INDEX, json.dumps({"identity": self.identity, "files": files}))
        except BaseException as error:
            shutil.rmtree(self.path, ignore_errors=True)
            if isinstance(error, OSError):
                raise self._cannot_write(error) from None
            raise


def _split(specs: Mapping[str, TensorSpec]) -> list[dict[str, TensorSpec]]:
    """Parts of at most ``SHARD_BYTES``, or of one tensor."""
    parts: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if parts[-1] and size + spec.nbytes > SHARD_BYTES:
            parts.append({})
            size = 0
        parts[-1][name] = spec
        size += spec.nbytes
    return parts
