"""A safetensors file written tensor by tensor: nothing but the present tensor is in memory.

``safetensors.torch.save_file`` wants all tensors of a file at once, and puts them where they happen to come. The format
(https://github.com/huggingface/safetensors) is the length of a header, the header in JSON, and the bytes of the tensors
without a hole. Here every tensor whose bytes fill whole cache lines begins at one: products of matrices do not add in
the same order elsewhere, so that a mapped model would differ from one in memory in the last bits. The few others come
last, in the order of their alignment: whatever their shapes, each one can be used where it is.
"""

import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path

import torch

from quanto_hf.io.checkpoint import DTYPE_NAMES
from quanto_hf.io.formats.base import WRITER_KEY
from quanto_hf.io.formats.quanto import GUARD_SHAPE, guards_for
from quanto_hf.io.mapped import ALIGNMENT
from quanto_hf.io.safe_files import replacing
from quanto_hf.schemes import TensorSpec


def write_shard(
    path: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a file and bring it to the disk. One that is there is replaced, not written over: a model may be mapped
    from it.

    Args:
        path: of the file.
        specs: name -> shape and dtype.
        tensors: (name, tensor) in the order of ``specs``.
        metadata: strings for the header.

    Raises:
        ValueError: the tensors are not those of ``specs``.
        OSError: the file cannot be written. What was there before is still there, as after the other error.
    """
    offsets = _offsets(specs)
    header = _header(specs, offsets, metadata)
    wanted = iter(specs.items())
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(header)
        for name, tensor in tensors:
            expected, spec = next(wanted, ("nothing", None))
            if spec is None or (name, tuple(tensor.shape), tensor.dtype) != (expected, spec.shape, spec.dtype):
                raise ValueError(f"got {name} {tensor.dtype} {list(tensor.shape)} in the place of {expected}: {spec}")
            if tensor.numel():
                file.seek(len(header) + offsets[name])
                file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        if (left := next(wanted, None)) is not None:
            raise ValueError(f"the file lacks {left[0]}")


def write_model_file(
    tensors: Mapping[str, torch.Tensor], path: str | PathLike[str], metadata: Mapping[str, str]
) -> None:
    """Write a file of a saved model as :func:`write_shard` does; with a guard for each packed weight (docs/format.md)
    unless its metadata says that it is in another format than ours.

    Args:
        tensors: by the names in the file, on any device.
        path: of the file.
        metadata: strings for the header.

    Raises:
        ValueError: the file format does not have the dtype of a tensor.
        OSError: the file cannot be written.
    """
    held = dict(sorted(tensors.items()))
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in held.items()}
    for name, spec in specs.items():
        if spec.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name} is {spec.dtype}, which cannot be saved; convert it, or leave it out")
    for name, packed in guards_for(specs).items() if WRITER_KEY not in metadata else ():
        # of one dtype: readers map both at the same place, and torch.save refuses two views of other types
        specs[name] = TensorSpec(GUARD_SHAPE, specs[packed].dtype)
        held[name] = torch.empty(GUARD_SHAPE, dtype=specs[packed].dtype)
    write_shard(Path(path), specs, held.items(), dict(sorted(metadata.items())))


def _offsets(specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Where each tensor begins: what fills whole cache lines first; then the wide dtypes, so that an odd number of
    bytes is followed by bytes only, and of those the largest ones."""
    offsets, end = dict[str, int](), 0
    for name in sorted(specs, key=lambda name: _place(specs[name])):
        offsets[name] = end
        end += specs[name].nbytes
    # where its weight begins: readers list tensors by offset, and many at one place would come in any order
    for guard, packed in guards_for(specs).items():
        if guard in specs and not specs[guard].nbytes:
            offsets[guard] = offsets[packed]
    return offsets


def _place(spec: TensorSpec) -> tuple[bool, int, int]:
    return spec.nbytes % ALIGNMENT != 0, -spec.dtype.itemsize, -spec.nbytes


def _header(specs: Mapping[str, TensorSpec], offsets: Mapping[str, int], metadata: Mapping[str, str]) -> bytes:
    """The length in 8 bytes, and the JSON, filled up with spaces."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    for name, begin in offsets.items():
        spec, end = specs[name], begin + specs[name].nbytes
        header[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
