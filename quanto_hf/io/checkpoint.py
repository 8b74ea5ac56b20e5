"""Headers of safetensors files, and the comparison of what is in them with what a model needs."""

from collections.abc import Container, Iterable, Mapping
from os import PathLike
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from quanto_hf.schemes import TensorSpec

# as the headers of safetensors files name them
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# the names of dtypes in the headers of safetensors files
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint does not hold what its model needs."""


def read_headers(files: Iterable[str | PathLike[str]]) -> dict[str, TensorSpec]:
    """Name -> shape and dtype of every tensor in safetensors files. Reads no data.

    Raises:
        CheckpointError: a file is damaged, or has a tensor that another one has too.
    """
    found: dict[str, TensorSpec] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():
                    if name in found:
                        raise CheckpointError(f"{name} is in more than one file of the checkpoint, also in {file}")
                    part = handle.get_slice(name)
                    dtype: Any = DTYPES.get(part.get_dtype(), part.get_dtype())
                    found[name] = TensorSpec(tuple(part.get_shape()), dtype)
        except SafetensorError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from None
    return found


def check_tensors(
    wanted: Mapping[str, TensorSpec],
    found: Mapping[str, TensorSpec],
    unexpected: Iterable[str] = (),
    exact: Container[str] = (),
    more: Iterable[str] = (),
) -> None:
    """Compare what a model needs with what a checkpoint has.

    Args:
        wanted: name -> shape and dtype. A float dtype may be any float dtype; other dtypes are exact.
        found: name -> shape and dtype, by the names of the model.
        unexpected: names in the checkpoint for which the model has no place.
        exact: names of tensors of which a float dtype is exact too: scales, zeros and codebooks.
        more: other lines for the error.

    Raises:
        CheckpointError: lists every missing, unexpected and mismatched tensor by name, sorted.
    """
    lines = [f"missing: {name} ({_text(spec)})" for name, spec in sorted(wanted.items()) if name not in found]
    lines += [f"unexpected: {name}" for name in sorted(unexpected)]
    for name, spec in sorted(wanted.items()):
        if name not in found:
            continue
        if found[name].shape != spec.shape:
            lines.append(f"wrong shape: {name} is {list(found[name].shape)}, but the model needs {list(spec.shape)}")
        elif found[name].dtype != spec.dtype and (name in exact or not _same_dtype(found[name].dtype, spec.dtype)):
            lines.append(f"wrong dtype: {name} is {_name(found[name].dtype)}, but the model needs {_name(spec.dtype)}")
    lines += more
    if lines:
        raise CheckpointError("the checkpoint does not fit the model:\n  " + "\n  ".join(lines))


def _same_dtype(found: Any, wanted: torch.dtype) -> bool:
    if found == wanted:
        return True
    return wanted in _FLOATS and found in _FLOATS


# between these the loader converts, as it does for any model
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _text(spec: TensorSpec) -> str:
    return f"{_name(spec.dtype)} {list(spec.shape)}"


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
