"""Files that are there whole or not at all: written under a name of their own, brought to the disk, and renamed."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What the names begin with under which files are written: what a killed process leaves can be told by it.
TEMPORARY = ".quanto_hf_tmp-"


@contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Where to write a file, which gets its name at the end of the block. Until then a former file of this name stays
    as it is; whoever has mapped it keeps it.

    Args:
        path: of the file; its folder is there.
        temporary: on the same disk; None is a name in the same folder, which no other process uses.

    Raises:
        OSError: the file cannot be written. Nothing is left of it then, as after any error in the block.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "a.txt")
        >>> with replacing(file) as temporary:
        ...     _ = temporary.write_text("all of it")
        >>> file.read_text(), len(list(file.parent.iterdir()))
        ('all of it', 1)
    """
    if temporary is None:
        # another suffix than that of the file: whoever lists weight files does not see it
        temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}.part")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str, temporary: Path | None = None) -> None:
    """A small file in UTF-8, as :func:`replacing` writes it."""
    with replacing(path, temporary) as file:
        file.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
