"""A lock whose file is there only while it is held."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from quanto_hf.io import folder_lock
from quanto_hf.io.folder_lock import only_one
from quanto_hf.io.whole_save import LOCK, save_whole


def test_one_at_a_time_is_inside_and_no_file_is_left(tmp_path):
    file, inside, most = tmp_path / "lock", 0, 0

    def enter(_):
        nonlocal inside, most
        with only_one(file):
            inside += 1
            most = max(most, inside)
            time.sleep(0.002)
            inside -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(enter, range(60)))
    assert most == 1 and not file.exists()


def test_who_waited_for_a_file_that_is_gone_waits_for_the_one_that_is_there(tmp_path, monkeypatch):
    # a lock that does not look whether its file is still there, as in older versions of filelock: it is removed
    # between opening and locking
    file, first = tmp_path / "lock", True
    acquire = FileLock.acquire

    def acquire_late(self, *args, **kwargs):
        nonlocal first
        found = acquire(self, *args, **kwargs)
        if first:
            first = False
            file.unlink()
        return found

    monkeypatch.setattr(folder_lock.FileLock, "acquire", acquire_late)
    with only_one(file):
        assert file.exists()
        # another one that comes now waits
        entered = threading.Event()

        def enter():
            with only_one(file):
                entered.set()

        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(10)
    thread.join()
    assert not file.exists()


def test_the_file_is_gone_before_the_lock_is_free(tmp_path, monkeypatch):
    # else who has just got the lock would lose its file to the one who had it before
    file, there = tmp_path / "lock", []
    release = FileLock.release

    def watched(self, *args, **kwargs):
        there.append(file.exists())
        return release(self, *args, **kwargs)

    monkeypatch.setattr(folder_lock.FileLock, "release", watched)
    with only_one(file):
        pass
    assert there[0] is False


def test_saves_into_one_folder_never_overlap_however_slowly_the_lock_file_goes(tmp_path, monkeypatch):
    # removed after the lock was given back, it would be the file of the next one, and a third one would make a new one
    unlink, inside, most = Path.unlink, 0, 0

    def slow(self, *args, **kwargs):
        if self.name == LOCK:
            time.sleep(0.2)
        return unlink(self, *args, **kwargs)

    def write(folder):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.15)
        (folder / "config.json").write_text("{}")
        inside -= 1

    monkeypatch.setattr(Path, "unlink", slow)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: save_whole(tmp_path, write), range(9)))
    assert most == 1 and [file.name for file in tmp_path.iterdir()] == ["config.json"]
