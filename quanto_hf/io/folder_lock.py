"""A lock for a folder that leaves no file behind."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock


@contextmanager
def only_one(file: Path) -> Iterator[None]:
    """Wait until no other thread or process is in here with the same file, which exists meanwhile only.

    The file is removed while the lock is held: who has opened it, and waits, would else get the lock of a file that
    nobody else can open any more, beside one who makes a new file. Whoever gets the lock looks whether it is that of
    the file which is there now, and waits again if it is not.

    Raises:
        OSError: the file cannot be made.
    """
    lock: Any = FileLock(file)
    lock.acquire()
    while not _is_there(lock, file):
        lock.release()
        lock.acquire()
    try:
        yield
    finally:
        if os.name != "nt":
            with suppress(OSError):
                file.unlink()
        lock.release()
        if os.name == "nt":
            # there a file cannot be removed while anybody has it open, so that nobody waits for one that is gone
            with suppress(OSError):
                file.unlink()


def _is_there(lock: Any, file: Path) -> bool:
    """Whether a path still leads to the file that is locked."""
    held = getattr(getattr(lock, "_context", None), "lock_file_fd", None)
    if held is None or os.name == "nt":
        return True
    try:
        return os.path.samestat(os.fstat(held), os.stat(file))
    except OSError:
        return False
