"""A safetensors file written tensor by tensor: nothing but the present tensor is in memory.

``safetensors.torch.save_file`` wants all tensors of a file at once. The format (https://github.com/huggingface/
safetensors) is the length of a header, the header in JSON, and the bytes of the tensors one after the other.
"""

import hashlib
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
) -> str:
    """Write a file and bring it to the disk.

    Args:
        path: of the file, which is overwritten.
        specs: name -> shape and dtype, in the order of the file.
        tensors: (name, tensor) in the same order.
        metadata: strings for the header.

    Returns:
        The SHA-256 of the file, in hexadecimal digits.

    Raises:
        ValueError: the tensors are not those of ``specs``.
        OSError: the file cannot be written.
    """
    digest = hashlib.sha256()
    wanted = iter(specs.items())
    with open(path, "wb") as file:

        def put(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        put(_header(specs, metadata))
        for name, tensor in tensors:
            expected, spec = next(wanted, ("nothing", None))
            if spec is None or (name, tuple(tensor.shape), tensor.dtype) != (expected, spec.shape, spec.dtype):
                raise ValueError(f"got {name} {tensor.dtype} {list(tensor.shape)} in the place of {expected}: {spec}")
            if tensor.numel():
                put(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        if (left := next(wanted, None)) is not None:
            raise ValueError(f"the file lacks {left[0]}")
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The length in 8 bytes, and the JSON, filled up with spaces."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + spec.nbytes
        header[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
