"""Tensors that go to disk: left where they are while the model loads, and made once the folder is known."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import WeightConverter
from transformers.integrations.accelerate import get_device

from quanto_hf.hf.convert.outfolder import fingerprint
from quanto_hf.hf.load.loading import quantize_into
from quanto_hf.hf.load.names import loader_names, slot_at, split_name, stored_name, targets_of
from quanto_hf.hf.offload.identity import identity
from quanto_hf.io import MappedFiles, OffloadFolder, read_headers
from quanto_hf.nn.slots import joined
from quanto_hf.schemes import TensorSpec


@dataclass
class Origin:
    """The tensors of the checkpoint that a tensor of the model is made of, each with the pattern by which the converter
    knows it; without a converter it is one, and only has another name."""

    converter: WeightConverter | None
    parts: list[tuple[str, str]] = field(default_factory=list)

    def describe(self) -> Any:
        """All that decides about the values, in JSON types."""
        keys = [key for key, _ in self.parts]
        operations = self.converter.operations if self.converter is not None else []
        return [keys, identity(operations)]

    def make(self, model: Any, first: str, read: Callable[[str], torch.Tensor]) -> dict[str, Any]:
        """What the loader makes of the tensors, by the names in the model.

        Args:
            first: the first of these names.
            read: gives a tensor by its name in the checkpoint.
        """
        if self.converter is None:
            return {first: read(self.parts[0][0])}
        converter = copy.deepcopy(self.converter)
        for key, pattern in self.parts:
            converter.add_tensor(first, key, pattern, partial(read, key))
        found: dict[str, Any] = converter.convert(first, model=model, config=model.config)
        return found


@dataclass(frozen=True)
class Taken:
    """A tensor of the model that is not made yet: the (first) name of its origin, and shape and dtype as a float; of a
    weight that comes in pieces those of the first one."""

    first: str
    spec: TensorSpec


@dataclass
class Deferred:
    """What of a model is to be offloaded to disk, and is not a tensor of the checkpoint as it is.

    transformers would write each of these tensors to a file of its own, at once, and says nowhere into which folder
    before it has done so.

    Args:
        device_map: the final one.
        files: of the float checkpoint.
        conversions: what the loader does with the names and tensors in them.
    """

    device_map: Mapping[str, Any]
    files: Sequence[str]
    conversions: Iterable[Any]
    taken: dict[str, Taken] = field(default_factory=dict)

    def __post_init__(self) -> None:
        safe = all(file.endswith(".safetensors") for file in self.files)
        self._file_of = {key: file for file in self.files if safe for key in read_headers([file])}
        self._origins: dict[str, Origin] | None = None

    def __deepcopy__(self, memo: Any) -> "Deferred":
        # the loader copies what it converts with
        return self

    def wants(self, model: torch.nn.Module, first: str) -> bool:
        """Whether something that the loader merges or splits goes to disk, so that it has to be asked for."""
        origin = self._made_from(model).get(first)
        if origin is None or origin.converter is None:
            return False
        return any(get_device(self.device_map, name) == "disk" for name in targets_of(origin.converter, first))

    def takes(self, model: torch.nn.Module, first: str, name: str, piece: torch.Tensor) -> bool:
        """Whether a tensor is left for later: it goes to disk, and comes from safetensors files, which can be read
        again.

        Args:
            model: the one that is loaded.
            first: the first of the names that the loader makes together.
            name: of this one.
            piece: what the loader has made of it, or the first of the pieces along its first dimension.
        """
        origin = self._made_from(model).get(first)
        owner, leaf = split_name(model, name)
        # buffers stay in memory
        if origin is None or leaf in owner._buffers or get_device(self.device_map, name) != "disk":
            return False
        if origin.converter is None and len(origin.parts) > 1:
            return False
        self.taken[name] = Taken(first, TensorSpec(tuple(piece.shape), piece.dtype))
        return True

    def _made_from(self, model: Any) -> Mapping[str, Origin]:
        """By the (first) name in the model. Asked for the first time before anything is converted, when the model has
        all of its names."""
        if self._origins is None:
            self._origins = {}
            state = model.state_dict()
            # a copy: conversions remember which names they have seen
            names = loader_names(model, self._file_of, copy.deepcopy(list(self.conversions)), state)
            for key, name, converter, pattern in names:
                if name in state:
                    self._origins.setdefault(name, Origin(converter)).parts.append((key, pattern))
        return self._origins

    def write(self, model: torch.nn.Module, folder: str | PathLike[str]) -> dict[str, tuple[Path, TensorSpec]]:
        """Make all of them and write them into a folder, one after the other, unless it has them already.

        Returns:
            Name of each stored tensor -> its file there, and what it is.

        Raises:
            ValueError: a weight has NaN or infinite values.
            OSError: the folder cannot be written.
        """
        origins = self._made_from(model)
        specs: dict[str, TensorSpec] = {}
        weights = {}
        for name, taken in self.taken.items():
            found = slot_at(model, name)
            weights[name] = [str(taken.spec.dtype), origins[taken.first].describe()]
            if found is None:
                specs[name] = taken.spec
                continue
            layer, slot = found
            weights[name] += [layer.scheme_of(slot).to_dict(), identity(layer.fit_of(slot))]
            owner = name.rpartition(".")[0]
            parts = slot.specs(layer.scheme_of(slot), taken.spec.dtype)
            specs.update({joined(owner, leaf): spec for leaf, spec in parts.items()})
        settings = {"checkpoint": fingerprint([Path(file) for file in self.files]), "weights": weights}
        written = OffloadFolder(folder, settings, specs).fill(partial(self._make, model))
        self.taken = {}
        return {name: (written[name], spec) for name, spec in specs.items()}

    def _make(self, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        mapped = MappedFiles()
        made: dict[str, Any] = {}
        for name, taken in self.taken.items():
            if name not in made:
                # what the loader makes together comes together here too
                made = self._convert(model, taken.first, taken.spec.dtype, mapped)
            value = made.pop(name)
            found = slot_at(model, name)
            if found is None:
                # as the loader takes it
                yield name, value[0] if isinstance(value, list) else value
            else:
                for part, tensor in quantize_into(found[0], value, name).items():
                    yield stored_name(found[1], name, part), tensor

    def _convert(self, model: Any, first: str, dtype: torch.dtype, mapped: MappedFiles) -> dict[str, Any]:
        """What the loader makes of an origin, by the names in the model."""
        origin = self._made_from(model)[first]

        def read(key: str) -> torch.Tensor:
            return mapped.tensor(self._file_of[key], key).to(dtype)

        return origin.make(model, first, read)
