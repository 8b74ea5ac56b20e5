"""A file that is written tensor by tensor is what safetensors itself would have written, in another order."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quanto_hf.io import read_headers
from quanto_hf.io.checkpoint import DTYPE_NAMES
from quanto_hf.io.shard_writer import ALIGNMENT, write_model_file, write_shard
from quanto_hf.schemes import TensorSpec

DTYPES = tuple(DTYPE_NAMES)
SHAPES = [(), (0,), (1,), (3,), (5, 7), (0, 4), (2, 0, 3), (1, 1, 1, 9), (64, 64)]


def specs_of(tensors):
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def write(path, tensors, **metadata):
    write_shard(path, specs_of(tensors), tensors.items(), metadata)
    return path


def draw(dtype, shape):
    """Any bits, NaN included; a bool has two values."""
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.randint(2, shape, dtype=torch.uint8).bool()
    return torch.randint(256, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype).view(shape)


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def assert_same(found, tensors):
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape_is_read_back_by_safetensors(dtype, tmp_path):
    tensors = {f"t{i}": draw(dtype, shape) for i, shape in enumerate(SHAPES)}
    file = write(tmp_path / "a.safetensors", tensors, format="pt")
    assert_same(load_file(file), tensors)
    with safe_open(file, framework="pt") as handle:
        assert_same({name: handle.get_tensor(name) for name in handle.keys()}, tensors)
        assert handle.metadata() == {"format": "pt"}
    assert read_headers([file]) == specs_of(tensors)


tensor_lists = st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=8)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensor_lists)
def test_any_mixture_can_be_used_where_it_lies(tmp_path, drawn):
    tensors = {f"t.{i}": draw(dtype, tuple(shape)) for i, (dtype, shape) in enumerate(drawn)}
    file = write(tmp_path / "a.safetensors", tensors)
    found = load_file(file)
    assert_same(found, tensors)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert (8 + length) % ALIGNMENT == 0
    assert len(data) == 8 + length + sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.itemsize == 0
        assert found[name].data_ptr() % tensor.itemsize == 0


def test_a_view_is_written_as_what_it_shows(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    tensors = {"t": base.t(), "part": base[1:3, ::2], "grad": torch.ones(3, requires_grad=True)}
    assert_same(load_file(write(tmp_path / "a", tensors)), tensors)


def test_names_and_metadata_may_have_any_letters(tmp_path):
    tensors = {'a "quoted" name': torch.ones(1), "größe.重み": torch.zeros(2)}
    file = write(tmp_path / "a", tensors, note='"\\ é')
    assert_same(load_file(file), tensors)
    with safe_open(file, framework="pt") as handle:
        assert handle.metadata() == {"note": '"\\ é'}


def test_a_former_file_is_replaced_as_a_whole(tmp_path):
    write(tmp_path / "a", {"long": torch.ones(1000)})
    tensors = {"short": torch.ones(3, dtype=torch.int8)}
    assert_same(load_file(write(tmp_path / "a", tensors)), tensors)


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    class Counted(torch.Tensor):
        alive = 0

        def __del__(self):
            Counted.alive -= 1

    most = 0

    def make():
        nonlocal most
        for i in range(10):
            Counted.alive += 1
            most = max(most, Counted.alive)
            yield f"t{i}", torch.full((5,), float(i)).as_subclass(Counted)

    specs = {f"t{i}": TensorSpec((5,), torch.float32) for i in range(10)}
    write_shard(tmp_path / "a", specs, make(), {})
    # the one that the generator makes, and the one before it, which the caller's loop still names
    assert most <= 2


ONE, TWO = torch.ones(2, 3), torch.ones(4, dtype=torch.int8)
WRONG = {
    "order": ([("b", TWO), ("a", ONE)], r"got b .*in the place of a"),
    "name": ([("a", ONE), ("c", TWO)], r"got c .*in the place of b"),
    "shape": ([("a", ONE.t()), ("b", TWO)], r"got a torch\.float32 \[3, 2\] in the place of a"),
    "dtype": ([("a", ONE.half()), ("b", TWO)], r"got a torch\.float16"),
    "too-many": ([("a", ONE), ("b", TWO), ("c", ONE)], r"got c .*in the place of nothing"),
    "too-few": ([("a", ONE)], "the file lacks b"),
    "none": ([], "the file lacks a"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_other_tensors_than_announced_are_refused(fault, tmp_path):
    tensors, said = WRONG[fault]
    with pytest.raises(ValueError, match=said):
        write_shard(tmp_path / "a", specs_of({"a": ONE, "b": TWO}), tensors, {})


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "none" / "a", {"a": ONE})


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_what_a_file_of_a_model_holds_can_be_written_by_torch_and_safetensors_again(dtype, tmp_path):
    """torch.save refuses two tensors of different dtypes at one address, which is where a guard is mapped."""
    tensors = {"a.weight_packed": torch.arange(64).to(dtype).view(4, 16), "a.weight_scale": torch.ones(4, 1)}
    write_model_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    state = load_file(tmp_path / "model.safetensors")
    assert state["a.weight"].shape == (0,) and state["a.weight"].dtype is dtype
    torch.save(state, tmp_path / "state.bin")
    save_file(state, tmp_path / "again.safetensors")
    for again in (torch.load(tmp_path / "state.bin"), load_file(tmp_path / "again.safetensors")):
        assert again.keys() == state.keys() and all(torch.equal(again[n], t) for n, t in state.items())
