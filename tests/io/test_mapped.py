"""Each file is mapped once, its tensors are its pages, and it is unmapped when they are gone."""

import gc
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quanto_hf import CheckpointError
from quanto_hf.io import MappedFiles

needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mappings are read from /proc")

NAMES = [f"t{i}" for i in range(8)]


def value(name: str) -> torch.Tensor:
    return torch.full((32, 32), float(name[1:]))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({name: value(name) for name in NAMES}, path)
    return path


def mappings(file) -> list[tuple[int, int]]:
    """The addresses at which a file is mapped."""
    gc.collect()
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(file) in line:
            begin, end = line.split()[0].split("-")
            found.append((int(begin, 16), int(end, 16)))
    return found


@needs_proc
def test_all_tensors_of_a_file_are_pages_of_one_mapping(file):
    mapped = MappedFiles()
    tensors = {name: mapped.tensor(file, name) for name in NAMES * 2}
    ((begin, end),) = mappings(file)
    assert all(begin <= tensor.data_ptr() < end for tensor in tensors.values())
    assert all(torch.equal(tensor, value(name)) for name, tensor in tensors.items())


@needs_proc
def test_a_file_is_unmapped_when_the_last_tensor_is_gone(file):
    mapped = MappedFiles()
    one, two = mapped.tensor(file, "t1"), mapped.tensor(file, "t2")
    del mapped
    assert len(mappings(file)) == 1
    del one
    assert len(mappings(file)) == 1 and torch.equal(two, value("t2"))
    del two
    assert mappings(file) == []


def test_a_file_may_be_removed_or_replaced_once_it_is_mapped(file):
    mapped = MappedFiles()
    mapped.map(file)
    other = file.with_name("other")
    save_file({"t3": torch.zeros(1)}, other)
    os.replace(other, file)
    assert torch.equal(mapped.tensor(file, "t3"), value("t3"))
    file.unlink()
    assert torch.equal(mapped.tensor(file, "t4"), value("t4"))


def test_writing_to_a_tensor_does_not_change_the_file(file):
    before = file.read_bytes()
    MappedFiles().tensor(file, "t5").zero_()
    assert file.read_bytes() == before


def test_a_path_and_its_text_are_the_same_file(file):
    mapped = MappedFiles()
    pointers = {mapped.tensor(path, "t0").data_ptr() for path in (file, str(file))}
    assert len(pointers) == 1


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def header(file):
    file.write_bytes(b"\x08" + file.read_bytes()[1:])


FAULTS = {
    "truncated": cut,
    "header": header,
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("not a safetensors file at all"),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_cannot_be_read_is_named(fault, file):
    FAULTS[fault](file)
    for use in (lambda mapped: mapped.tensor(file, "t0"), lambda mapped: mapped.map(file)):
        with pytest.raises(CheckpointError) as error:
            use(MappedFiles())
        assert str(error.value).startswith(f"{file} cannot be read: ")


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        MappedFiles().map(tmp_path)


def test_a_tensor_that_a_file_does_not_have_is_named_and_others_are_still_read(file):
    mapped = MappedFiles()
    with pytest.raises(CheckpointError, match=r"^other cannot be read from .*weights\.safetensors: .*other"):
        mapped.tensor(file, "other")
    assert torch.equal(mapped.tensor(file, "t0"), value("t0"))


def test_a_file_that_was_damaged_is_tried_again(file):
    mapped, good = MappedFiles(), file.read_bytes()
    cut(file)
    with pytest.raises(CheckpointError):
        mapped.map(file)
    file.write_bytes(good)
    assert torch.equal(mapped.tensor(file, "t0"), value("t0"))


@needs_proc
@pytest.mark.parametrize("count", [2, 8])
def test_threads_share_one_mapping(count, file):
    mapped, wrong, kept = MappedFiles(), [], []
    start = threading.Barrier(count)

    def work(k: int) -> None:
        start.wait()
        for i in range(200):
            name = NAMES[(i * (k + 1)) % len(NAMES)]
            tensor = mapped.tensor(file, name)
            kept.append(tensor)
            if not torch.equal(tensor, value(name)):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(mappings(file)) == 1
