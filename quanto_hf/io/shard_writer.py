"""A safetensors file written tensor by tensor: nothing but the present tensor is in memory.

``safetensors.torch.save_file`` wants all tensors of a file at once. The format (https://github.com/huggingface/
safetensors) is the length of a header, the header in JSON, and the bytes of the tensors without a hole. The tensors lie
in the order of their alignment, as in the files that ``save_file`` writes: whatever their shapes, each one can be used
where it is.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from quanto_hf.io.checkpoint import DTYPE_NAMES
from quanto_hf.schemes import TensorSpec

# The data begins at a multiple of a cache line.
ALIGNMENT = 64


def write_shard(
    path: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a file and bring it to the disk.

    Args:
        path: of the file, which is overwritten.
        specs: name -> shape and dtype.
        tensors: (name, tensor) in the order of ``specs``.
        metadata: strings for the header.

    Raises:
        ValueError: the tensors are not those of ``specs``.
        OSError: the file cannot be written.
    """
    offsets = _offsets(specs)
    header = _header(specs, offsets, metadata)
    wanted = iter(specs.items())
    with open(path, "wb") as file:
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
        file.flush()
        os.fsync(file.fileno())


def _offsets(specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Where each tensor begins: the wide dtypes first, so that an odd number of bytes is followed by bytes only."""
    offsets, end = dict[str, int](), 0
    for name in sorted(specs, key=lambda name: -specs[name].dtype.itemsize):
        offsets[name] = end
        end += specs[name].nbytes
    return offsets


def _header(specs: Mapping[str, TensorSpec], offsets: Mapping[str, int], metadata: Mapping[str, str]) -> bytes:
    """The length in 8 bytes, and the JSON, filled up with spaces."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    for name, begin in offsets.items():
        spec, end = specs[name], begin + specs[name].nbytes
        header[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
