"""Weights that go to disk: left where they are while the model loads, and quantized once the folder is known."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.accelerate import get_device

from quanto_hf.hf.loading import quantize_into, split_name
from quanto_hf.hf.outfolder import fingerprint
from quanto_hf.io import MappedFiles, OffloadFolder, read_headers
from quanto_hf.nn import QuantizedWeight
from quanto_hf.schemes import TensorSpec


@dataclass(frozen=True)
class Source:
    """Where the float weight of a layer is, and the dtype in which it is quantized."""

    file: str
    key: str
    dtype: torch.dtype


@dataclass
class Deferred:
    """The layers of a model that are to be offloaded to disk, and have not been quantized yet.

    transformers would write each quantized tensor to a file of its own, at once, and says nowhere into which folder
    before it has done so.

    Args:
        device_map: the final one.
        files: of the float checkpoint.
    """

    device_map: Mapping[str, Any]
    files: Sequence[str]
    layers: dict[str, Source] = field(default_factory=dict)

    def __post_init__(self) -> None:
        safe = all(file.endswith(".safetensors") for file in self.files)
        self._file_of = {key: file for file in self.files if safe for key in read_headers([file])}

    def __deepcopy__(self, memo: Any) -> "Deferred":
        # the loader copies what it converts with
        return self

    def takes(self, name: str, pieces: list[torch.Tensor], source: Iterable[str], target: Iterable[str]) -> bool:
        """Whether a float weight is left for later: it goes to disk, and is one tensor of a safetensors file, which
        can be read again.

        Args:
            name: of the weight in the model.
            pieces: what the loader has read.
            source: the names that the loader merged; exact ones only where it merged nothing.
            target: the names that it made.
        """
        (key, *others), targets = list(source), list(target)
        if others or targets != [name] or key not in self._file_of or get_device(self.device_map, name) != "disk":
            return False
        self.layers[name] = Source(self._file_of[key], key, pieces[0].dtype)
        return True

    def write(self, model: torch.nn.Module, folder: str | PathLike[str]) -> dict[str, tuple[Path, TensorSpec]]:
        """Quantize all of them into a folder, one after the other, unless it has them already.

        Returns:
            Name of each stored tensor -> its file there, and what it is.

        Raises:
            ValueError: a weight has NaN or infinite values.
            OSError: the folder cannot be written.
        """
        layers = {name: _layer(model, name) for name in self.layers}
        specs: dict[str, TensorSpec] = {}
        for name, layer in layers.items():
            parts = layer.scheme.tensors(layer.matrix_shape, self.layers[name].dtype)
            specs.update({_stored(layer, name, part): spec for part, spec in parts.items()})
        settings = {
            "checkpoint": fingerprint([Path(file) for file in self.files]),
            "layers": {
                name: [
                    layer.scheme.to_dict(),
                    _describe(layer.fit),
                    self.layers[name].key,
                    str(self.layers[name].dtype),
                ]
                for name, layer in layers.items()
            },
        }

        def make() -> Iterator[tuple[str, torch.Tensor]]:
            mapped = MappedFiles()
            for name, layer in layers.items():
                source = self.layers[name]
                stored = quantize_into(layer, mapped.tensor(source.file, source.key).to(source.dtype), name)
                for part, tensor in stored.items():
                    yield _stored(layer, name, part), tensor

        written = OffloadFolder(folder, settings, specs).fill(make)
        self.layers = {}
        return {name: (written[name], spec) for name, spec in specs.items()}


def _layer(model: torch.nn.Module, name: str) -> QuantizedWeight:
    layer, _ = split_name(model, name)
    assert isinstance(layer, QuantizedWeight)
    return layer


def _stored(layer: QuantizedWeight, weight: str, part: str) -> str:
    return f"{weight.removesuffix('weight')}{layer.prefix}{part}"


def _describe(fit: Any) -> Any:
    """A fit in JSON types; one that is an object by its class and its values."""
    if fit is None or isinstance(fit, str):
        return fit
    return [f"{type(fit).__module__}.{type(fit).__qualname__}", repr(sorted(vars(fit).items()))]
