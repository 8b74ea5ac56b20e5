"""A file is there whole, or as it was before: whatever happens while it is written."""

import os
import signal
import stat
import subprocess
import sys

import pytest

from quanto_hf.io import safe_files
from quanto_hf.io.safe_files import TEMPORARY, file_digest, replacing, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_has_its_name_only_when_it_is_finished(tmp_path):
    with replacing(tmp_path / "a.safetensors") as file:
        file.write_bytes(b"half")
        assert file.parent == tmp_path and file.name.startswith(TEMPORARY)
        # nobody who lists weight files takes it for one
        assert not list(tmp_path.glob("*.safetensors"))
    assert names(tmp_path) == ["a.safetensors"] and (tmp_path / "a.safetensors").read_bytes() == b"half"


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(safe_files.os, "fsync", lambda number: done.append("fsync") or fsync(number))
    monkeypatch.setattr(safe_files.os, "replace", lambda *paths: done.append("replace") or replace(*paths))
    write_text(tmp_path / "a", "ü")
    assert done == ["fsync", "replace"] and (tmp_path / "a").read_bytes() == "ü".encode()


@pytest.mark.parametrize("failing", ["block", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_after_an_error_there_is_what_was_there_before(failing, error, tmp_path, monkeypatch):
    def fails(*args):
        raise error

    write_text(tmp_path / "a", "before")
    if failing != "block":
        monkeypatch.setattr(safe_files.os, failing, fails)
    with pytest.raises(type(error)), replacing(tmp_path / "a") as file:
        file.write_text("after")
        if failing == "block":
            fails()
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "before"


KILLED = """
import os, signal, sys
from pathlib import Path
from quanto_hf.io.safe_files import replacing
with replacing(Path(sys.argv[1], "a")) as file:
    file.write_text("after")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_process_leaves_the_former_file_and_one_with_another_name(tmp_path):
    write_text(tmp_path / "a", "before")
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)]).returncode == -signal.SIGKILL
    left = [name for name in names(tmp_path) if name.startswith(TEMPORARY)]
    assert len(left) == 1 and names(tmp_path) == sorted(["a", *left])
    assert (tmp_path / "a").read_text() == "before"


def test_a_file_that_is_mapped_or_open_stays_what_it_was(tmp_path):
    write_text(tmp_path / "a", "before")
    with open(tmp_path / "a") as former:
        write_text(tmp_path / "a", "after")
        assert former.read() == "before" and (tmp_path / "a").read_text() == "after"


def test_the_name_meanwhile_may_be_given(tmp_path):
    (tmp_path / "work").mkdir()
    write_text(tmp_path / "a", "x", tmp_path / "work" / "a")
    assert names(tmp_path) == ["a", "work"] and not names(tmp_path / "work")


def test_others_may_read_what_is_written(tmp_path):
    (tmp_path / "usual").write_text("")
    write_text(tmp_path / "a", "x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_the_digest_is_that_of_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
