"""Disk offload when something goes wrong: killed, full, damaged, shared, read-only. Nothing good is ever lost."""

import errno
import json
import os
import random
import shutil
import subprocess
import time
import warnings

import accelerate
import pytest
import torch
from offload_processes import (
    DISK,
    MIXED,
    context,
    load,
    load_slowly,
    load_together,
    logits,
    save_into_its_own_folder,
    save_slowly,
)
from safetensors.torch import load_file, save_file
from tiny_models import lively, qlinears, save

from quanto_hf import CheckpointError
from quanto_hf.hf.offload.hooks import MappedWeights
from quanto_hf.io import offload_folder
from quanto_hf.io.safe_files import TEMPORARY

NAME = "model.layers.1.mlp.up_proj.weight"
PROCESSES = context()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A float model, and the quantized one in one file and in several."""
    made = tmp_path_factory.mktemp("offload")
    save("llama", made / "float", torch.bfloat16)
    model = load(made / "float")
    model.save_pretrained(made / "quantized")
    model.save_pretrained(made / "sharded", max_shard_size="20KB")
    return made


@pytest.fixture(scope="module")
def wanted(place):
    """The logits of the model in memory."""
    return logits(load(place / "float"))


def entries(off):
    """The entries of an offload folder that count."""
    return sorted(path.parent for path in off.glob("quanto_hf-*/index.json"))


def contents(folder):
    """Everything in a folder but locks, which come and go."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path.relative_to(folder): path.read_bytes() for path in files}


def assert_same_weights(out, right):
    """Two saved models have the same weight files, byte for byte but for the order in the header's metadata, which
    safetensors leaves to chance."""

    def parts(file):
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        return json.loads(data[8:end]), data[end:]

    made, wanted = (sorted(path.name for path in folder.glob("*.safetensors")) for folder in (out, right))
    assert made == wanted
    for name in made:
        assert parts(out / name) == parts(right / name), name


def assert_used_again(place, off, wanted):
    """A load finds the entry, and changes nothing."""
    before = {path: path.stat().st_mtime_ns for path in off.rglob("*") if path.is_file()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*written again")
        assert torch.equal(logits(load(place / "float", off, device_map=DISK)), wanted)
    assert {path: path.stat().st_mtime_ns for path in before} == before


# ---------------------------------------------------------------------------------------------------------- killed


def killed(target, args, begun, seconds):
    """Start a process, wait until it has begun, and kill it after some time. True if it was killed before its end."""
    process = PROCESSES.Process(target=target, args=args)
    process.start()
    deadline = time.monotonic() + 60
    while not begun() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (-9, 0)
    return process.exitcode == -9


def test_a_load_that_is_killed_at_any_point_leaves_a_folder_that_the_next_one_makes_right(place, wanted, tmp_path):
    draw, interrupted = random.Random(0), 0
    for i in range(8):
        off = tmp_path / f"off{i // 4}"
        # about 25 files of 4 ms each
        begun = lambda off=off: any(off.glob("quanto_hf-*/*"))  # noqa: E731
        if killed(load_slowly, (place / "float", off, 0.004), begun, draw.uniform(0, 0.08)):
            interrupted += not entries(off)
        if i % 2:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*written again")
                assert torch.equal(logits(load(place / "float", off, device_map=DISK)), wanted)
            (whole,) = entries(off)
            assert not list(whole.glob(f"{TEMPORARY}*"))
            assert_used_again(place, off, wanted)
            shutil.rmtree(whole)
    assert interrupted >= 4


def test_a_killed_load_leaves_the_entries_of_others(place, wanted, tmp_path):
    load(place / "float", tmp_path, "int8", DISK)
    before = contents(tmp_path)
    begun = lambda: len(list(tmp_path.glob("quanto_hf-*"))) == 2  # noqa: E731
    assert killed(load_slowly, (place / "float", tmp_path, 0.01), begun, 0.02)
    assert contents(tmp_path).items() >= before.items()
    assert torch.equal(logits(load(place / "float", tmp_path, device_map=DISK)), wanted)
    assert contents(tmp_path).items() >= before.items()


def test_a_save_that_is_killed_at_any_point_never_loads_wrongly(place, wanted, tmp_path):
    off, draw, interrupted = tmp_path / "off", random.Random(1), 0
    load(place / "float", off, device_map=DISK)
    for i in range(5):
        out = tmp_path / f"out{i}"
        begun = lambda out=out: any(out.glob(".quanto_hf_save-*/files/*"))  # noqa: E731
        if killed(save_slowly, (place / "float", off, out, 0.004), begun, draw.uniform(0, 0.04)):
            try:
                found = logits(load(out, weights=None))
            except (OSError, ValueError):
                interrupted += 1
            else:
                assert torch.equal(found, wanted)
        assert_used_again(place, off, wanted)
        load(place / "float", off, device_map=DISK).save_pretrained(out, max_shard_size="20KB")
        assert torch.equal(logits(load(out, weights=None)), wanted)
    assert_same_weights(out, place / "sharded")
    assert interrupted >= 2


# ------------------------------------------------------------------------------------------- full and read-only disks


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of some bytes, if this process may."""
    mounted = []

    def mount(size):
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount")
        if done.returncode:
            pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        # files of it may still be mapped
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_disk_that_is_too_small_is_said_in_bytes_and_nothing_is_left(place, small_disk):
    disk = small_disk("16k")
    with pytest.raises(OSError, match=r"needs [\d,]{5,} bytes, but its disk has [\d,]+ left") as error:
        load(place / "float", disk / "off", device_map=DISK)
    assert error.value.errno == errno.ENOSPC and str(disk / "off") in str(error.value)
    assert not contents(disk)


@pytest.mark.parametrize("size", ["36k", "48k", "64k"])
def test_a_disk_that_is_full_in_the_middle_is_said_in_bytes_and_nothing_is_left(size, place, small_disk, monkeypatch):
    disk = small_disk(size)
    # somebody else takes the space after the question how much there is
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 10**9))
    monkeypatch.setattr(offload_folder, "SHARD_BYTES", 20_000)
    with pytest.raises(OSError, match=r"[\d,]{5,} bytes cannot be written to the offload folder .*: No space left"):
        load(place / "float", disk, "int8", DISK)
    assert not contents(disk)


def test_an_earlier_entry_on_a_full_disk_stays_good(place, wanted, small_disk):
    disk = small_disk("80k")
    load(place / "float", disk, device_map=DISK)
    before = contents(disk)
    with pytest.raises(OSError, match="but its disk has"):
        load(place / "float", disk, "int8", DISK)
    assert contents(disk) == before
    assert_used_again(place, disk, wanted)


def test_a_damaged_entry_on_a_full_disk_makes_room_for_the_right_one(place, wanted, small_disk):
    disk = small_disk("80k")
    load(place / "float", disk, device_map=DISK)
    (whole,) = entries(disk)
    os.truncate(next(whole.glob("*.safetensors")), 100)
    with open(whole / f"{TEMPORARY}left", "wb") as file, pytest.raises(OSError):
        while True:
            os.write(file.fileno(), bytes(4096))
    assert shutil.disk_usage(disk).free == 0
    with pytest.warns(UserWarning, match="is written again"):
        assert torch.equal(logits(load(place / "float", disk, device_map=DISK)), wanted)


def test_a_save_to_a_full_disk_fails_and_the_model_goes_on(place, wanted, small_disk, tmp_path):
    disk = small_disk("32k")
    model = load(place / "float", tmp_path / "off", device_map=DISK)
    with pytest.raises(Exception, match="No space left"):
        model.save_pretrained(disk / "out")
    assert torch.equal(logits(model), wanted)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out", weights=None)), wanted)


def read_only(disk):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


def test_a_read_only_folder_works_if_the_entry_is_complete(place, wanted, small_disk):
    disk = small_disk("1m")
    load(place / "float", disk, device_map=DISK)
    read_only(disk)
    assert_used_again(place, disk, wanted)


@pytest.mark.parametrize("below", ["", "not/there"])
def test_a_read_only_folder_is_said_if_the_entry_is_missing(below, place, small_disk):
    disk = small_disk("1m")
    read_only(disk)
    with pytest.raises(OSError, match="Read-only file system") as error:
        load(place / "float", disk / below, device_map=DISK)
    assert str(disk) in str(error.value)


def test_a_read_only_folder_is_said_if_the_entry_is_damaged(place, small_disk):
    disk = small_disk("1m")
    load(place / "float", disk, device_map=DISK)
    os.truncate(entries(disk)[0] / "index.json", 5)
    before = contents(disk)
    read_only(disk)
    with pytest.raises(OSError, match=r"bytes cannot be written to the offload folder .*: Read-only file system"):
        load(place / "float", disk, device_map=DISK)
    assert contents(disk) == before


# --------------------------------------------------------------------------------------------------------- damages


def change_a_byte(entry):
    file = next(entry.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


DAMAGES = {
    "altered": (change_a_byte, "has been changed"),
    "truncated": (lambda entry: os.truncate(next(entry.glob("*.safetensors")), 1000), "has 1000 bytes instead of"),
    "missing": (lambda entry: next(entry.glob("*.safetensors")).unlink(), "is missing"),
    "index": (lambda entry: (entry / "index.json").write_text('{"files": '), r"index\.json is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_written_again_with_a_warning(damage, place, wanted, tmp_path):
    change, said = DAMAGES[damage]
    load(place / "float", tmp_path, device_map=DISK)
    good = contents(tmp_path)
    change(entries(tmp_path)[0])
    with pytest.warns(UserWarning, match=f"is written again: .*{said}"):
        assert torch.equal(logits(load(place / "float", tmp_path, device_map=DISK)), wanted)
    assert contents(tmp_path) == good
    assert_used_again(place, tmp_path, wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(bad, place, wanted, tmp_path):
    shutil.copytree(place / "float", tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    tensors[NAME][3, 5] = bad
    save_file(tensors, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{NAME}: the weight has NaN or infinite values"):
        load(tmp_path / "bad", tmp_path / "off", device_map=DISK)
    assert not contents(tmp_path / "off")
    assert torch.equal(logits(load(place / "float", tmp_path / "off", device_map=DISK)), wanted)


@pytest.mark.parametrize("device_map", [None, DISK, MIXED], ids=["memory", "disk", "mixed"])
@pytest.mark.parametrize("which", ["quantized", "sharded"])
def test_a_truncated_file_of_a_quantized_checkpoint_is_named_first(which, device_map, place, tmp_path):
    shutil.copytree(place / which, tmp_path / "cut")
    file = sorted((tmp_path / "cut").glob("*.safetensors"))[-1]
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(CheckpointError, match=rf"{file.name} cannot be read: "):
        load(tmp_path / "cut", tmp_path / "off", None, device_map)
    assert not (tmp_path / "off").exists()


# ------------------------------------------------------------------------------------------------- what else is there


def test_two_models_share_a_folder(place, wanted, tmp_path):
    save("llama", tmp_path / "other", torch.bfloat16)
    from transformers import LlamaForCausalLM

    other = LlamaForCausalLM.from_pretrained(tmp_path / "other")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    off = tmp_path / "off"
    right = logits(load(tmp_path / "other"))
    first = load(tmp_path / "other", off, device_map=DISK)
    before = contents(off)
    second = load(place / "float", off, device_map=DISK)
    assert len(entries(off)) == 2 and contents(off).items() >= before.items()
    assert torch.equal(logits(first), right) and torch.equal(logits(second), wanted)
    assert_used_again(place, off, wanted)


def test_files_of_accelerate_and_transformers_in_the_folder_stay_and_serve(place, wanted, tmp_path):
    from transformers import LlamaForCausalLM

    theirs = lively(LlamaForCausalLM.from_pretrained(place / "float"))
    right = logits(theirs)
    accelerate.disk_offload(theirs, tmp_path, execution_device=torch.device("cpu"))
    # transformers writes what is not in safetensors files tensor by tensor
    (tmp_path / f"{NAME}.safetensors").write_bytes(b"not ours")
    before = contents(tmp_path)
    assert (tmp_path / "index.json").exists() and len(before) > 10
    for _ in range(2):
        assert torch.equal(logits(load(place / "float", tmp_path, device_map=DISK)), wanted)
    assert contents(tmp_path).items() >= before.items() and len(entries(tmp_path)) == 1
    assert torch.equal(logits(theirs), right)


def test_an_entry_of_another_format_version_is_neither_used_nor_touched(place, wanted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(offload_folder, "FORMAT_VERSION", 99)
        load(place / "float", tmp_path, device_map=DISK)
    before = contents(tmp_path)
    assert torch.equal(logits(load(place / "float", tmp_path, device_map=DISK)), wanted)
    assert len(entries(tmp_path)) == 2 and contents(tmp_path).items() >= before.items()


def test_two_processes_on_one_folder_write_the_entry_once(place, wanted, tmp_path):
    barrier, results = PROCESSES.Barrier(2), PROCESSES.Queue()
    both = [
        PROCESSES.Process(target=load_together, args=(place / "float", tmp_path, barrier, results)) for _ in range(2)
    ]
    for process in both:
        process.start()
    found = [results.get(timeout=60) for _ in both]
    for process in both:
        process.join()
    files = len(list(entries(tmp_path)[0].glob("*.safetensors")))
    assert sorted(written for *_, written in found) == [0, files] and files > 5
    for _, answer, _ in found:
        assert torch.equal(torch.tensor(answer), wanted.float())
    assert [process.exitcode for process in both] == [0, 0]


def test_an_offload_folder_that_is_a_file_is_named(place, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="File exists") as error:
        load(place / "float", tmp_path / "file", device_map=DISK)
    assert str(tmp_path / "file") in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_on_the_fly_a_folder_is_needed(place):
    with pytest.raises(
        ValueError,
        match=r"14 weights on disk .*but no offload_folder says where; give off",
    ):
        load(place / "float", device_map=DISK)


# ------------------------------------------------------------------------------------ saving over what is in use


def tensors_of(folder):
    """All tensors of a saved model."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("size", ["20KB", "35KB", "1GB"], ids=["same-files", "other-files", "one-file"])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"device_map": DISK}, {"device_map": MIXED}, {"device_map": DISK, "dtype": torch.float32}],
    ids=["memory", "disk", "mixed", "another-dtype"],
)
def test_a_model_can_be_saved_into_the_folder_that_it_is_mapped_from(kwargs, size, place, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(place / "sharded", folder)
    former = tensors_of(folder)
    results = PROCESSES.Queue()
    process = PROCESSES.Process(target=save_into_its_own_folder, args=(folder, kwargs, size, results))
    process.start()
    process.join(60)
    # a file that is truncated while it is mapped ends the process with SIGBUS, -7
    assert process.exitcode == 0
    before, after = results.get(timeout=10)
    assert before == after
    assert logits(load(folder, weights=None, dtype=kwargs.get("dtype", "auto"))).tolist() == before
    saved = tensors_of(folder)
    assert set(saved) == set(former)
    for name, tensor in former.items():
        assert torch.equal(saved[name], tensor.to(saved[name].dtype)), name


def test_hooks_read_what_was_mapped_before_save_pretrained_removed_it(tmp_path):
    from accelerate.utils import OffloadedWeightsLoader

    index = {}
    for name in ("a", "b"):
        file = tmp_path / f"model-0000{len(index) + 1}-of-00002.safetensors"
        save_file({name: torch.full((3,), 2.0)}, file)
        index[name] = {"safetensors_file": str(file), "weight_name": name, "dtype": "float32"}
    weights = MappedWeights(OffloadedWeightsLoader(save_folder=None, index=index), {})
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert torch.equal(weights["a"] + weights["b"], torch.full((3,), 4.0))


def test_an_offloaded_model_can_be_saved_over_the_float_one_that_it_came_from(place, wanted, tmp_path):
    shutil.copytree(place / "float", tmp_path / "model")
    model = load(tmp_path / "model", tmp_path / "off", device_map=DISK)
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(model), wanted)
    loaded = load(tmp_path / "model", weights=None, device_map=DISK)
    assert torch.equal(logits(loaded), wanted) and len(qlinears(loaded)) == 14
    assert json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]["weights"] == "int4"
