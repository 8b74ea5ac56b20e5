"""Where the tensors of a float model are in a checkpoint, and reading them one at a time."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open

from quanto_hf.hf.load.decoding import Unread
from quanto_hf.hf.load.pieces import Pieces
from quanto_hf.hf.offload.deferred import Origin
from quanto_hf.io import CheckpointError
from quanto_hf.io.decoders import EncodedFiles
from quanto_hf.schemes import TensorSpec


@dataclass(frozen=True)
class Source:
    """Where a tensor is, and its shape and dtype there; of an encoded one those of the float, and what decodes it."""

    file: str
    key: str
    spec: TensorSpec
    encoded: EncodedFiles | None = None


@dataclass(frozen=True)
class Merged:
    """What a converter of the loader makes one tensor of, and where each of its tensors is, by their names."""

    origin: Origin
    sources: dict[str, Source] = field(default_factory=dict)


class Files:
    """The weight files, mapped while this is open."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def close(self) -> None:
        """Let go of the files."""
        self._stack.close()

    def read(self, source: Source, dtype: torch.dtype) -> torch.Tensor:
        """A tensor."""
        if source.encoded is not None:
            return Unread(source.encoded, source.key, dtype).whole()
        if source.file not in self._files:
            self._files[source.file] = self._stack.enter_context(safe_open(source.file, framework="pt"))
        tensor: torch.Tensor = self._files[source.file].get_tensor(source.key)
        return tensor.to(dtype)

    def pieces(
        self, source: Source | Merged, name: str, dtype: torch.dtype, model: Any
    ) -> torch.Tensor | list[torch.Tensor] | Pieces:
        """A float parameter as it is quantized: stacked experts one at a time.

        Args:
            name: of the parameter.
            model: the empty one.
        """
        if isinstance(source, Merged):
            made = source.origin.make(model, name, lambda key: self.read(source.sources[key], dtype))
            found: torch.Tensor | list[torch.Tensor] | Pieces = made[name]
            return found
        if source.encoded is not None:
            return Unread(source.encoded, source.key, dtype).pieces()
        return self.read(source, dtype)

    def whole(self, source: Source | Merged, name: str, dtype: torch.dtype, model: Any) -> torch.Tensor:
        """A parameter that stays float.

        Raises:
            CheckpointError: what is merged has the wrong shape.
        """
        if isinstance(source, Source):
            return self.read(source, dtype)
        made = self.pieces(source, name, dtype, model)
        tensor = made[0] if isinstance(made, list) else made
        assert isinstance(tensor, torch.Tensor)
        if tensor.shape != (wanted := model.get_parameter_or_buffer(name).shape):
            raise CheckpointError(f"wrong shape: {name} is {list(tensor.shape)}, but the model needs {list(wanted)}")
        return tensor
