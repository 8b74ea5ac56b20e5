"""A checkpoint of another method, which the loader of transformers meets as if it were a float one.

The loader would convert parts of encoded tensors to the dtype of the model before any operation sees them. So the
conversions of the model are told by name which tensors are encoded, and read those themselves, when they are wanted.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
)

from quanto_hf.hf.config.refusals import refuse_optimum_quanto
from quanto_hf.hf.load.names import loader_names, slot_at
from quanto_hf.hf.load.pieces import Pieces
from quanto_hf.hf.memory.sizes import Kept
from quanto_hf.io import CheckpointError, read_headers
from quanto_hf.io.decoders import Decoder, EncodedFiles, as_floats
from quanto_hf.io.pickled import read_pickled_headers
from quanto_hf.schemes import TensorSpec

# the name that the loader gets for what it is to leave alone
PART = "<part of an encoded tensor>"
# the pattern by which an encoded tensor is known that no other conversion takes; no name has it
ALONE = "<encoded>"


class Decoding:
    """A checkpoint of another method while it is loaded, or one that needs no decoding. One for all conversions, which
    are copied often.

    Args:
        decoder: of the method, or None.
    """

    def __init__(self, decoder: Decoder | None) -> None:
        self.decoder = decoder
        self.files: EncodedFiles | None = None
        self.dtype, self.kept = torch.float32, Kept()
        # the names that the loader is to use in the place of others, and encoded tensors as the renamings leave them
        self.names: dict[str, str] = {}
        self.renamed: frozenset[str] = frozenset()
        # the converters of the model as they are for a float checkpoint
        self.plain: list[Any] = []

    def __deepcopy__(self, memo: Any) -> "Decoding":
        return self

    def open(self, files: list[str], dtype: torch.dtype, kept: Kept) -> dict[str, TensorSpec] | None:
        """The headers of a checkpoint, as floats if it is decoded; of files of torch.save they cannot always be told.

        Args:
            dtype: in which the model is loaded.
            kept: what it keeps in another one (:func:`quanto_hf.hf.memory.sizes.kept_dtypes`).

        Raises:
            CheckpointError: it was written by optimum-quanto, is damaged, or cannot be decoded from such files.
        """
        if self.decoder is None:
            safe = all(file.endswith(".safetensors") for file in files)
            headers = read_headers(files) if safe else read_pickled_headers(files)
            refuse_optimum_quanto(headers or (), files)
            return headers
        self.files, self.dtype, self.kept = EncodedFiles(self.decoder, files), dtype, kept
        self.names = {key: name for key, name in self.files.float_names.items() if key != name}
        self.names.update(dict.fromkeys(self.files.others, PART))
        return self.files.headers

    def headers(self, found: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
        """Headers as floats, of files that are not here.

        Raises:
            CheckpointError: a part is missing, or parts do not fit each other.
        """
        return found if self.decoder is None else as_floats(self.decoder, found)

    def is_encoded(self, key: str) -> bool:
        """Whether a name in the files is that of the first part of an encoded tensor."""
        return self.files is not None and key in self.files.float_names

    def unread(self, key: str, target: str) -> "Unread":
        """A float tensor, which is not read yet.

        Args:
            key: the name in the files of its first part.
            target: the (first) name in the model of what is made of it, which has its dtype.
        """
        assert self.files is not None
        dtype = next((kept for pattern, kept in self.kept if pattern.search(target)), self.dtype)
        return Unread(self.files, self.files.float_names[key], dtype)

    def conversions(self, conversions: list[Any], model: Any) -> list[Any]:
        """The loader's conversions for the checkpoint, from those for a float one.

        Raises:
            CheckpointError: an encoded tensor would be loaded as it is.
        """
        if self.files is None:
            return conversions
        # a copy: conversions remember which names they have seen
        renamings = [entry for entry in copy.deepcopy(conversions) if isinstance(entry, WeightRenaming)]
        names = sorted(self.files.encoded, key=dot_natural_key)
        self.renamed = frozenset(apply_renamings(name, renamings) for name in names)
        wrapped = [_decoding_converter(self, e) if isinstance(e, WeightConverter) else e for e in conversions]
        made = [DecodedNames(self), *wrapped, DecodeAlone(self)]
        state = model.state_dict()
        for key, name, converter, _ in loader_names(model, self.files.float_names, copy.deepcopy(made), state):
            if converter is None and name in state:
                raise CheckpointError(f"{key} cannot be decoded: a renaming of {type(model).__name__} hides it")
        # what is decoded together with another tensor is no surprise
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), f"{PART}$"}
        return made

    def check(self) -> None:
        """Raise CheckpointError for weights that are encoded and come from no files."""
        if self.decoder is not None and self.files is None:
            raise CheckpointError(
                f"the config says that the weights are in {self.decoder.methods[0]}, which is decoded from safetensors "
                "files: give from_pretrained their folder, or a config without quantization_config if they are floats"
            )

    def finish(self, model: Any) -> None:
        """Have a loaded model saved as if it came from a float checkpoint, and let go of the files."""
        if self.decoder is None:
            return
        if hasattr(model, "_weight_conversions"):
            model._weight_conversions = _without_decoding(model._weight_conversions)
        # what the other method says of itself
        for name in getattr(model.config, "sub_configs", {}):
            part: Any = getattr(model.config, name, None)
            if getattr(part, "quantization_config", None) is not None:
                del part.quantization_config
        self.files, self.plain = None, []


@dataclass(frozen=True)
class Unread:
    """A tensor of an encoded checkpoint, by its name as a float."""

    files: EncodedFiles
    name: str
    dtype: torch.dtype

    def whole(self) -> torch.Tensor:
        """All of it."""
        return self.files.read(self.name, self.dtype)

    def pieces(self) -> torch.Tensor | Pieces:
        """The matrices of a stacked one, shape (1, rows, columns), each decoded when it is asked for; or all of it."""
        if self.files.encoded[self.name].leading != 1:
            return self.whole()
        return Pieces(matrix.unsqueeze(0) for matrix in self.files.matrices(self.name, self.dtype))


class DecodedNames(WeightRenaming):  # type: ignore[misc]
    """Gives an encoded tensor the name that it would have in a float checkpoint, before all other renamings."""

    __slots__ = ("decoding",)

    def __init__(self, decoding: Decoding) -> None:
        super().__init__(ALONE, ALONE)
        self.decoding = decoding

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The other name, and None: nobody asks for the pattern of a renaming."""
        return self.decoding.names.get(source_key, source_key), None


class Decodes:
    """Of a converter that gets encoded tensors as floats, on the CPU (:func:`decoding_converter`)."""

    __slots__ = ()

    def add_tensor(self: Any, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        """Take a tensor; of an encoded one not what the loader would read, but what decodes it when it is called."""
        if self.decoding.is_encoded(source_key):
            future = self.decoding.unread(source_key, target_key).whole
        super().add_tensor(target_key, source_key, source_pattern, future)  # type: ignore[misc]


class Decode(ConversionOps):  # type: ignore[misc]
    """Decodes a tensor; stacked experts that are to be packed one at a time, when each is asked for."""

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Args:
        input_dict: has one pattern, for one :class:`Unread`.
        full_layer_name: the name in the model.
        """
        ((unread,),) = input_dict.values()
        slot = slot_at(model, full_layer_name)
        return {full_layer_name: unread.pieces() if slot is not None and slot[1].leading else unread.whole()}


class DecodeAlone(Decodes, WeightConverter):  # type: ignore[misc]
    """Takes the encoded tensors that no converter of the model takes."""

    __slots__ = ("decoding",)

    def __init__(self, decoding: Decoding) -> None:
        super().__init__(ALONE, ALONE, [Decode()], force_cpu=True)
        self.decoding = decoding

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        """Take a tensor, which is left to the operation to read."""
        unread = partial(self.decoding.unread, source_key, target_key)
        WeightConverter.add_tensor(self, target_key, source_key, source_pattern, unread)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The name as it is, and the pattern if the tensor is encoded."""
        return source_key, ALONE if source_key in self.decoding.renamed else None


@cache
def _decoding_class(cls: Any) -> Any:
    return type(f"Decoding{cls.__name__}", (Decodes, cls), {"__slots__": ("decoding", "number")})


def _decoding_converter(decoding: Decoding, converter: Any) -> Any:
    """A converter of the model that gets encoded tensors as floats."""
    sources, targets = converter._original_source_patterns, converter._original_target_patterns
    cls: Any = type(converter)
    made = _decoding_class(cls)(sources.copy(), targets.copy(), converter.operations, force_cpu=True)
    made.scope_prefix, made.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
    made.decoding, made.number = decoding, len(decoding.plain)
    decoding.plain.append(converter)
    return made


def plain_converter(conversion: Any) -> Any:
    """A conversion of the model as it is for a float checkpoint."""
    if not isinstance(conversion, Decodes) or isinstance(conversion, DecodeAlone):
        return conversion
    plain: Any = conversion.decoding.plain[conversion.number]  # type: ignore[attr-defined]
    plain._was_used = conversion._was_used  # type: ignore[attr-defined]
    return plain


def _without_decoding(conversions: Iterable[Any]) -> list[Any]:
    """The conversions for a float checkpoint."""
    return [plain_converter(entry) for entry in conversions if not isinstance(entry, DecodedNames | DecodeAlone)]
