"""The files of an encoded checkpoint, of which any tensor is read as a float."""

from collections.abc import Iterable, Iterator, Mapping
from os import PathLike, fspath
from typing import Any

import torch

from quanto_hf.io.checkpoint import CheckpointError, read_headers
from quanto_hf.io.decoders.base import Decoder, Encoded, as_floats
from quanto_hf.io.mapped import MappedFiles
from quanto_hf.schemes import TensorSpec


class EncodedFiles:
    """Safetensors files in which some tensors are encoded. They are mapped when they are first read, and a stacked
    tensor is decoded matrix by matrix.

    Args:
        decoder: of the method.
        files: all of the checkpoint.

    Raises:
        CheckpointError: a file is damaged or of another kind, or a part of an encoded tensor is missing.
    """

    def __init__(self, decoder: Decoder, files: Iterable[str | PathLike[str]]) -> None:
        self.decoder = decoder
        self.file_of: dict[str, str] = {}
        headers: dict[str, TensorSpec] = {}
        for file in [fspath(file) for file in files]:
            if not file.endswith(".safetensors"):
                raise CheckpointError(f"{file} is no safetensors file: {decoder.methods[0]} is decoded from those only")
            found = read_headers([file])
            if twice := next((key for key in found if key in headers), None):
                raise CheckpointError(f"{twice} is in more than one file of the checkpoint, also in {file}")
            headers.update(found)
            self.file_of.update(dict.fromkeys(found, file))
        self.encoded: Mapping[str, Encoded] = decoder.find(headers)
        # of a float checkpoint with the same tensors
        self.headers = as_floats(decoder, headers)
        self.float_names = {found.main: name for name, found in self.encoded.items()}
        self.others = {key for key in headers if key not in self.float_names and key not in self.headers}
        self._mapped = MappedFiles()

    def __deepcopy__(self, memo: Any) -> "EncodedFiles":
        # the loader copies what it converts with, for each tensor
        return self

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor by its name in a float checkpoint, on the CPU.

        Args:
            dtype: of an encoded one, which needs one; None leaves another as it is.

        Raises:
            CheckpointError: the file is gone.
        """
        if (found := self.encoded.get(name)) is None:
            tensor = self._mapped.tensor(self.file_of[name], name)
            return tensor if dtype is None else tensor.to(dtype)
        assert dtype is not None
        if not found.leading:
            return self.decoder.decode(self._parts(found), dtype).contiguous()
        made = torch.empty(found.shape, dtype=dtype)
        for whole, matrix in zip(made.flatten(0, found.leading - 1), self.matrices(name, dtype), strict=True):
            whole.copy_(matrix)
        return made

    def matrices(self, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The matrices of a stacked encoded tensor, each decoded when it is asked for."""
        found = self.encoded[name]
        parts = {part: t.flatten(0, found.leading - 1) for part, t in self._parts(found).items()}
        for number in range(torch.Size(found.shape[: found.leading]).numel()):
            yield self.decoder.decode({part: tensor[number] for part, tensor in parts.items()}, dtype)

    def _parts(self, found: Encoded) -> dict[str, torch.Tensor]:
        return {part: self._mapped.tensor(self.file_of[key], key) for part, key in found.parts.items()}
