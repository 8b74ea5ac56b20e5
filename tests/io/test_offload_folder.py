"""An entry of an offload folder is written once, whole, checked at each use, and written again if it is not right."""

import errno
import hashlib
import json
import os
import shutil
import threading
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file

from quanto_hf.io import OffloadFolder, offload_folder, read_headers
from quanto_hf.io.safe_files import TEMPORARY
from quanto_hf.schemes import TensorSpec

TENSORS = {
    "a.weight_packed": torch.arange(35, dtype=torch.uint8).view(5, 7),
    "a.weight_scale": torch.arange(5.0).view(5, 1),
    "b.weight_packed": torch.arange(64, dtype=torch.int8).view(4, 16),
    "b.weight_scale": torch.ones(4, 1, dtype=torch.bfloat16),
    "c.empty": torch.empty(0, 3),
}
SPECS = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}
SETTINGS = {"checkpoint": "1234", "layers": {"a": ["affine", 4]}}


class Make:
    """Gives the tensors, and counts how often it is asked to."""

    def __init__(self, tensors=None):
        self.tensors, self.calls = tensors or TENSORS, 0

    def __call__(self):
        self.calls += 1
        yield from self.tensors.items()


def fill(folder, make=None, settings=SETTINGS, specs=SPECS):
    return OffloadFolder(folder, settings, specs).fill(make or Make())


def entry(folder):
    (found,) = folder.glob("quanto_hf-*")
    return found


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_right(where, tensors=TENSORS):
    assert set(where) == set(tensors)
    for name, tensor in tensors.items():
        found = load_file(where[name])[name]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name


@pytest.fixture(params=[1, 60, 2_000_000_000], ids=["a-file-each", "several-files", "one-file"])
def shards(request, monkeypatch):
    """How many bytes a file may have."""
    monkeypatch.setattr(offload_folder, "SHARD_BYTES", request.param)
    return request.param


# --------------------------------------------------------------------------------------------- first and second use


def test_the_first_use_writes_and_the_second_one_does_not(shards, tmp_path):
    make = Make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = fill(tmp_path / "new" / "folder", make)
        assert_right(first)
        before = {path: path.stat().st_mtime_ns for path in entry(tmp_path / "new" / "folder").iterdir()}
        assert fill(tmp_path / "new" / "folder", make) == first and make.calls == 1
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_files_have_at_most_the_allowed_bytes_or_one_tensor(shards, tmp_path):
    files = sorted(set(fill(tmp_path).values()))
    # 35 bytes, 20, 64, 8, none
    assert len(files) == {1: 5, 60: 3}.get(shards, 1)
    assert [file.name for file in files] == [
        f"weights-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))
    ]
    for file in files:
        sizes = [tensor.nbytes for tensor in load_file(file).values()]
        assert sum(sizes) <= shards or len(sizes) == 1
    assert {path.name for path in entry(tmp_path).iterdir()} == {"index.json", *(file.name for file in files)}


def test_the_index_has_the_size_and_digest_of_each_file_and_no_weight_is_elsewhere(shards, tmp_path):
    files = set(fill(tmp_path).values())
    index = json.loads((entry(tmp_path) / "index.json").read_text())
    assert index["files"] == {
        file.name: [file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files
    }
    assert index["identity"]["settings"] == SETTINGS
    assert read_headers(files) == SPECS


def test_an_entry_of_nothing_is_fine(tmp_path):
    for _ in range(2):
        assert fill(tmp_path, lambda: [], specs={}) == {}


OTHERS = {
    "settings": {"settings": {**SETTINGS, "checkpoint": "1235"}},
    "scheme": {"settings": {**SETTINGS, "layers": {"a": ["affine", 8]}}},
    "name": {"specs": {f"x.{name}": spec for name, spec in SPECS.items()}},
    "shape": {"specs": {**SPECS, "c.empty": TensorSpec((0, 4), torch.float32)}},
    "dtype": {"specs": {**SPECS, "c.empty": TensorSpec((0, 3), torch.float16)}},
    "fewer": {"specs": {"a.weight_packed": SPECS["a.weight_packed"]}},
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_decides_about_the_bytes_makes_another_entry(other, tmp_path):
    fill(tmp_path)
    before = contents(entry(tmp_path))
    specs = OTHERS[other].get("specs", SPECS)
    tensors = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    make = Make(tensors)
    assert_right(fill(tmp_path, make, **OTHERS[other]), tensors)
    assert make.calls == 1 and len(list(tmp_path.glob("quanto_hf-*"))) == 2
    assert contents(tmp_path).items() >= before.items()
    again = Make()
    assert_right(fill(tmp_path, again))
    assert again.calls == 0


def test_another_format_version_makes_another_entry(tmp_path, monkeypatch):
    fill(tmp_path)
    before, make = contents(entry(tmp_path)), Make()
    monkeypatch.setattr(offload_folder, "FORMAT_VERSION", offload_folder.FORMAT_VERSION + 1)
    assert_right(fill(tmp_path, make))
    assert make.calls == 1 and contents(tmp_path).items() >= before.items()


def test_other_things_in_the_folder_stay(tmp_path):
    (tmp_path / "index.json").write_text("{}")
    (tmp_path / "model.weight.dat").write_bytes(b"1234")
    (tmp_path / "quanto_hf-0123456789abcdef").mkdir()
    (tmp_path / "quanto_hf-0123456789abcdef" / f"{TEMPORARY}weights").write_bytes(b"5678")
    before = contents(tmp_path)
    fill(tmp_path)
    assert contents(tmp_path).items() >= before.items()


# --------------------------------------------------------------------------------------------------------- damages


def last_weights(folder):
    return sorted(folder.glob("weights-*"))[-1]


def altered(folder):
    file = last_weights(folder)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def truncated(folder):
    file = last_weights(folder)
    file.write_bytes(file.read_bytes()[:-1])


def index_of(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def a_folder_in_its_place(folder):
    file = last_weights(folder)
    file.unlink()
    file.mkdir()


DAMAGES = {
    "byte": (altered, "has been changed"),
    "truncated": (truncated, "bytes instead of"),
    "longer": (lambda folder: last_weights(folder).open("ab").write(b"more"), "bytes instead of"),
    "empty": (lambda folder: last_weights(folder).write_bytes(b""), "has 0 bytes instead of"),
    "missing": (lambda folder: last_weights(folder).unlink(), r"weights-.* is missing"),
    "folder": (a_folder_in_its_place, "bytes instead of"),
    "index-cut": (lambda folder: os.truncate(folder / "index.json", 20), r"index\.json is damaged"),
    "index-empty": (lambda folder: (folder / "index.json").write_text(""), r"index\.json is damaged"),
    "index-bytes": (lambda folder: (folder / "index.json").write_bytes(b"\xff\xfe\x00"), r"index\.json is damaged"),
    "index-list": (lambda folder: (folder / "index.json").write_text("[]"), r"index\.json is damaged"),
    "index-keys": (lambda folder: index_of(folder, lambda index: index.pop("files")), r"index\.json is damaged"),
    "index-types": (lambda folder: index_of(folder, lambda i: i.update(files=[1, 2])), r"index\.json is damaged"),
    "index-files": (lambda folder: index_of(folder, lambda index: index["files"].popitem()), "lacks tensors"),
    "index-identity": (
        lambda folder: index_of(folder, lambda index: index["identity"].update(format_version=0)),
        "belongs to other weights",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_written_again_with_a_warning(damage, shards, tmp_path):
    change, said = DAMAGES[damage]
    fill(tmp_path)
    good = contents(entry(tmp_path))
    change(entry(tmp_path))
    make = Make()
    with pytest.warns(UserWarning, match=f"is written again: .*{said}"):
        assert_right(fill(tmp_path, make))
    assert make.calls == 1 and contents(entry(tmp_path)) == good
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(fill(tmp_path, make))
    assert make.calls == 1


def test_who_has_mapped_a_damaged_entry_keeps_what_was_read(tmp_path):
    where = fill(tmp_path)
    held = load_file(where["a.weight_packed"])
    last_weights(entry(tmp_path)).with_name("index.json").write_text("")
    with pytest.warns(UserWarning, match="is written again"):
        fill(tmp_path)
    assert torch.equal(held["a.weight_packed"], TENSORS["a.weight_packed"])


def test_what_a_killed_writer_has_left_is_removed_without_a_warning(shards, tmp_path):
    fill(tmp_path)
    good = contents(entry(tmp_path))
    (entry(tmp_path) / "index.json").unlink()
    (entry(tmp_path) / f"{TEMPORARY}weights-00009-of-00009.safetensors").write_bytes(b"half")
    (entry(tmp_path) / "weights-00008-of-00009.safetensors").write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(fill(tmp_path))
    assert contents(entry(tmp_path)) == good


# ------------------------------------------------------------------------------------------------- what goes wrong


class Stopped(BaseException):
    """The user has pressed a key."""


@pytest.mark.parametrize("reason", [ValueError("a: NaN"), Stopped(), MemoryError()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("count", range(len(TENSORS) + 1))
def test_if_making_a_tensor_fails_nothing_is_left_and_the_next_call_works(reason, count, shards, tmp_path):
    def make():
        yield from list(TENSORS.items())[:count]
        raise reason

    if count == len(TENSORS):
        # nobody asks for more than there is
        assert_right(fill(tmp_path, make))
        return
    with pytest.raises(type(reason)) as error:
        fill(tmp_path, make)
    assert error.value is reason
    assert not list(tmp_path.glob("quanto_hf-*"))
    assert_right(fill(tmp_path))


def test_tensors_that_are_not_the_announced_ones_leave_nothing(shards, tmp_path):
    with pytest.raises(ValueError, match="in the place of"):
        fill(tmp_path, Make(dict(reversed(TENSORS.items()))))
    with pytest.raises(ValueError, match=r"the file lacks c\.empty"):
        fill(tmp_path, Make({name: tensor for name, tensor in TENSORS.items() if name != "c.empty"}))
    assert not list(tmp_path.glob("quanto_hf-*"))


def usage(free):
    return lambda _: shutil._ntuple_diskusage(10**9, 10**9 - free, free)


def test_a_disk_that_is_too_small_is_said_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", usage(126))
    make = Make()
    with pytest.raises(OSError, match=r"needs 127 bytes, but its disk has 126 left") as error:
        fill(tmp_path, make)
    assert error.value.errno == errno.ENOSPC and str(tmp_path) in str(error.value)
    assert make.calls == 0 and not list(tmp_path.glob("quanto_hf-*"))
    monkeypatch.setattr(shutil, "disk_usage", usage(127))
    assert_right(fill(tmp_path, make))


def test_what_a_killed_writer_has_left_does_not_count_as_used_space(tmp_path, monkeypatch):
    path = OffloadFolder(tmp_path, SETTINGS, SPECS).path
    path.mkdir()
    (path / f"{TEMPORARY}weights-00001-of-00001.safetensors").write_bytes(bytes(127))

    def free(_):
        return usage(0 if path.exists() and list(path.iterdir()) else 127)(_)

    monkeypatch.setattr(shutil, "disk_usage", free)
    assert_right(fill(tmp_path))


@pytest.mark.parametrize("when", range(1, 5))
def test_a_disk_that_is_full_in_the_middle_leaves_nothing_and_other_entries_stay(when, tmp_path, monkeypatch):
    fill(tmp_path)
    before, calls, fsync = contents(tmp_path), 0, os.fsync

    def full(descriptor):
        nonlocal calls
        calls += 1
        if calls == when:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(offload_folder, "SHARD_BYTES", 60)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"127 bytes cannot be written to the offload folder .*: No space left") as error:
        fill(tmp_path, settings={})
    assert error.value.errno == errno.ENOSPC and str(tmp_path) in str(error.value)
    assert {path: data for path, data in contents(tmp_path).items() if path.suffix != ".lock"} == {
        path: data for path, data in before.items() if path.suffix != ".lock"
    }
    monkeypatch.undo()
    assert_right(fill(tmp_path, settings={}))


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"127 bytes cannot be written to the offload folder .*file"):
            fill(folder)
    assert (tmp_path / "file").read_text() == "mine"


def test_threads_that_want_the_same_entry_write_it_once(tmp_path, monkeypatch):
    calls, results = [], []

    def make():
        calls.append(1)
        for item in TENSORS.items():
            time.sleep(0.01)
            yield item

    def work():
        results.append(fill(tmp_path, make))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(results) == 6
    for result in results:
        assert_right(result)
