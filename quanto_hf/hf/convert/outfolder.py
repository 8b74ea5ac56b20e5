"""A folder that is filled file by file, may be interrupted at any time, and is resumed by the same call only."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quanto_hf.io import CheckpointError, file_digest
from quanto_hf.io.inventory import INDEX
from quanto_hf.io.safe_files import TEMPORARY, replacing

RECORD = "quanto_hf_convert.json"
CARD = "README.md"
# what makes a folder a loadable model: written last, in this order, and removed first
LAST = (INDEX, "config.json")
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


class OutFolder:
    """The output of a conversion.

    Every file is written under a temporary name and renamed (:mod:`quanto_hf.io.safe_files`). A record of the settings
    and of the digest of each finished weight file is written first and stays, so that a second call knows whether it
    may go on here.

    Args:
        path: the folder; need not exist.
        settings: everything that decides about the bytes of the output, in JSON types.
        extra: names of further files that belong here.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any], extra: set[str]) -> None:
        self.path = Path(path)
        self.settings = json.loads(json.dumps(settings))
        self.extra = extra
        self.digests: dict[str, str] = {}
        self._verified: set[str] = set()

    def claim(self) -> None:
        """Check that the folder is empty, new, or holds what the same call began; then write the record.

        Raises:
            CheckpointError: it holds something else. Nothing has been written then.
            OSError: it cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"{self.path} is a file; give a folder")
        every = (str(file.relative_to(self.path)) for file in self.path.rglob("*") if not file.is_dir())
        names = {name for name in every if not name.startswith(TEMPORARY)}
        record = self._read_record() if RECORD in names else None
        foreign = sorted(name for name in names if not self._is_ours(name)) if record else sorted(names)
        if foreign:
            some = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
            raise CheckpointError(f"{self.path} holds files that this conversion did not write: {some}; give another")
        if record is not None:
            self._compare(record)
            self.digests = record["files"]
        self.path.mkdir(parents=True, exist_ok=True)
        for name in os.listdir(self.path):
            if name.startswith(TEMPORARY):
                left = self.path / name
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        self._write_record()

    def is_complete(self) -> bool:
        """Whether a former call has written everything, and all weight files are as it wrote them."""
        return (self.path / "config.json").exists() and bool(self.digests) and all(map(self.is_kept, self.digests))

    def reopen(self) -> None:
        """Remove what makes the folder loadable, before anything in it changes."""
        for name in reversed(LAST):
            (self.path / name).unlink(missing_ok=True)

    def is_kept(self, name: str) -> bool:
        """Whether a weight file is there with the digest that was recorded when it was written."""
        file = self.path / name
        if (
            name not in self._verified
            and name in self.digests
            and file.is_file()
            and file_digest(file) == self.digests[name]
        ):
            self._verified.add(name)
        return name in self._verified

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Where to write a file, which gets its name at the end of the block; it is on disk, whole, before that."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        # all of them in one folder, where the next call looks for what is left of them
        with replacing(target, self.path / f"{TEMPORARY}{name.replace('/', '-')}.part") as source:
            yield source
            if name != RECORD:
                # safetensors makes files that nobody else may read
                os.chmod(source, (self.path / RECORD).stat().st_mode)
            if WEIGHTS.fullmatch(name):
                # the record first: a file without its digest is written again, a digest without its file is harmless
                self.digests[name] = file_digest(source)
                self._write_record()
                self._verified.add(name)

    def write_text(self, name: str, text: str) -> None:
        """A small file, at once."""
        with self.writing(name) as file:
            file.write_text(text, encoding="utf-8")

    def copy(self, source: Path, name: str) -> None:
        """A copy of a file, at once."""
        with self.writing(name) as file:
            shutil.copyfile(source, file)

    def _is_ours(self, name: str) -> bool:
        known = {RECORD, CARD, "generation_config.json", *LAST, *self.extra}
        return name in known or WEIGHTS.fullmatch(name) is not None

    def _read_record(self) -> dict[str, Any]:
        try:
            record = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
            if isinstance(record["settings"], dict) and isinstance(record["files"], dict):
                return dict(record)
        except (ValueError, KeyError, TypeError):
            pass
        raise CheckpointError(f"{self.path / RECORD} is damaged; remove the folder, or give another")

    def _compare(self, record: Mapping[str, Any]) -> None:
        former, wanted = record["settings"], self.settings
        different = sorted(key for key in {*former, *wanted} if former.get(key) != wanted.get(key))
        if "model" in different:
            raise CheckpointError(f"{self.path} was begun from another model; give another folder")
        if different:
            pairs = ", ".join(f"{key}={former.get(key)!r} (now {wanted.get(key)!r})" for key in different)
            raise CheckpointError(f"{self.path} was begun with {pairs}; give the same settings, or another folder")

    def _write_record(self) -> None:
        record = {"settings": self.settings, "files": self.digests}
        self.write_text(RECORD, json.dumps(record, indent=2, sort_keys=True) + "\n")


def fingerprint(files: list[Path]) -> str:
    """A digest of the name, size, time of change and 16 evenly spaced blocks of 64 kB of each file, which takes
    milliseconds for a file of any size. A copy of a model counts as another one; that is the safe side."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda f: f.name):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} {file.stat().st_mtime_ns}\n".encode())
        with open(file, "rb") as handle:
            for step in range(16):
                handle.seek(size * step // 16)
                digest.update(handle.read(1 << 16))
    return digest.hexdigest()
