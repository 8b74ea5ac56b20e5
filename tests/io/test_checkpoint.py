"""Headers of safetensors files, and their comparison with what a model needs."""

import pytest
import torch
from safetensors.torch import save_file

from quanto_hf import CheckpointError
from quanto_hf.io import check_tensors, read_headers
from quanto_hf.schemes import TensorSpec

FLOAT = TensorSpec((2, 3), torch.float32)
CODES = TensorSpec((2, 3), torch.uint8)

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_header_tells_shape_and_dtype(dtype, tmp_path):
    save_file({"a": torch.zeros(2, 3).to(dtype), "b": torch.zeros(()).to(dtype)}, tmp_path / "x.safetensors")
    headers = read_headers([tmp_path / "x.safetensors"])
    assert headers == {"a": TensorSpec((2, 3), dtype), "b": TensorSpec((), dtype)}


def test_the_headers_of_several_files_are_one(tmp_path):
    for name in "abc":
        save_file({name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    assert sorted(read_headers(sorted(tmp_path.iterdir()))) == ["a", "b", "c"]


def test_a_tensor_in_two_files_is_refused_by_name(tmp_path):
    for name in "ab":
        save_file({"twice": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"twice is in more than one file of the checkpoint, also in .*b\.safe"):
        read_headers(sorted(tmp_path.iterdir()))


@pytest.mark.parametrize("keep", [0, 4, 40, -1], ids=["empty", "half-a-length", "half-a-header", "half-the-data"])
def test_a_damaged_file_is_named(keep, tmp_path):
    file = tmp_path / "broken.safetensors"
    save_file({"a": torch.zeros(100)}, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"broken\.safetensors cannot be read"):
        read_headers([file])


def test_a_checkpoint_that_fits_passes():
    assert check_tensors({"a": FLOAT, "b": CODES}, {"a": FLOAT, "b": CODES}) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_another_float_dtype_passes_because_the_loader_converts_it(dtype):
    assert check_tensors({"a": FLOAT}, {"a": TensorSpec((2, 3), dtype)}) is None


@pytest.mark.parametrize(
    ("wanted", "found"),
    [(torch.uint8, torch.int8), (torch.uint8, torch.float32), (torch.float32, torch.uint8), (torch.bfloat16, "F4")],
    ids=str,
)
def test_a_dtype_that_changes_the_meaning_is_refused(wanted, found):
    name = str(found).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=f"wrong dtype: a is {name}, but the model needs"):
        check_tensors({"a": TensorSpec((2,), wanted)}, {"a": TensorSpec((2,), found)})


def test_every_fault_is_listed_at_once_and_sorted():
    wanted = {"d": FLOAT, "b": FLOAT, "c": CODES, "a": FLOAT, "fine": FLOAT}
    found = {"a": TensorSpec((3, 2), torch.float32), "c": FLOAT, "fine": FLOAT}
    with pytest.raises(CheckpointError) as error:
        check_tensors(wanted, found, unexpected=["z", "y"])
    assert str(error.value).splitlines() == [
        "the checkpoint does not fit the model:",
        "  missing: b (float32 [2, 3])",
        "  missing: d (float32 [2, 3])",
        "  unexpected: y",
        "  unexpected: z",
        "  wrong shape: a is [3, 2], but the model needs [2, 3]",
        "  wrong dtype: c is float32, but the model needs uint8",
    ]


def test_a_checkpoint_error_is_a_value_error():
    assert issubclass(CheckpointError, ValueError)
