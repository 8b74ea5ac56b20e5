"""What it takes to read a checkpoint that is quantized by another method, as if it were a float one.

**Add a decoder.** One file with a subclass of :class:`Decoder` that is decorated with :func:`register_decoder`,
imported in ``quanto_hf/io/decoders/__init__.py``. ``find`` says, by names, shapes and dtypes in the headers alone,
which tensors are parts of an encoded one, and what its name and shape are as a float; ``decode`` makes one matrix of
its parts. All else follows: ``from_pretrained`` with a config of ours, plans, conversion, offload to disk.

    >>> import torch
    >>> from quanto_hf.io.decoders.base import DECODERS, Decoder, Encoded, register_decoder
    >>> @register_decoder("halves")
    ... class Halves(Decoder):
    ...     def find(self, headers):
    ...         found = {key.removesuffix("_twice"): key for key in headers if key.endswith("_twice")}
    ...         return {name: Encoded({"codes": key}, headers[key].shape) for name, key in found.items()}
    ...
    ...     def decode(self, parts, dtype):
    ...         return (parts["codes"].to(torch.float32) / 2).to(dtype)
    >>> decoder = DECODERS.pop("halves").of({"quant_method": "halves"})
    >>> decoder.decode({"codes": torch.tensor([[1, 3]], dtype=torch.int8)}, torch.bfloat16).tolist()
    [[0.5, 1.5]]
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from quanto_hf.schemes import TensorSpec


@dataclass(frozen=True)
class Encoded:
    """A float tensor as a checkpoint holds it.

    Args:
        parts: what the decoder calls a part -> its name in the files. The loader meets the first one in the place of
            the float tensor; the others are for the decoder only.
        shape: of the float tensor.
        leading: dimensions in front over which matrices, and their parts, are stacked.
    """

    parts: Mapping[str, str]
    shape: tuple[int, ...]
    leading: int = 0

    @property
    def main(self) -> str:
        """The name in the files of the first part."""
        return next(iter(self.parts.values()))


class Decoder(ABC):
    """How the tensors of one method become floats."""

    methods: ClassVar[tuple[str, ...]] = ()
    # ends of names of other tensors that the method writes, and nothing is made of: ranges of inputs, for example
    unused: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Decoder":
        """A decoder for a checkpoint.

        Args:
            config: the ``quantization_config`` in its config.json.
        """
        return cls()

    @abstractmethod
    def find(self, headers: Mapping[str, TensorSpec]) -> dict[str, Encoded]:
        """Name of the float tensor -> its parts, of all that are encoded.

        Args:
            headers: name in the files -> shape and dtype.

        Raises:
            CheckpointError: a part is missing, or parts do not fit each other.
        """

    @abstractmethod
    def decode(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """One matrix, on the CPU: [rows, columns] of ``dtype``; it need not be contiguous.

        Args:
            parts: by the names in :attr:`Encoded.parts`, without leading dimensions; usually pages of a mapped file.
            dtype: float32, bfloat16 or float16.
        """


DECODERS: dict[str, type[Decoder]] = {}


def register_decoder(*methods: str) -> Callable[[type[Decoder]], type[Decoder]]:
    """Let checkpoints of some methods be decoded; a decorator of the class.

    Args:
        methods: as ``quant_method`` in config.json.
    """

    def register(cls: type[Decoder]) -> type[Decoder]:
        cls.methods = methods
        DECODERS.update(dict.fromkeys(methods, cls))
        return cls

    return register


def decoder_of(config: Mapping[str, Any]) -> Decoder | None:
    """What decodes a checkpoint, or None.

    Args:
        config: the ``quantization_config`` in its config.json.
    """
    # the methods of transformers are an enum of strings
    method = config.get("quant_method")
    method = getattr(method, "value", method)
    found = DECODERS.get(method) if isinstance(method, str) else None
    return None if found is None else found.of(config)


def as_floats(decoder: Decoder, headers: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The headers that a float checkpoint would have in the place of an encoded one.

    Args:
        headers: name in the files -> shape and dtype.

    Raises:
        CheckpointError: a part is missing, or parts do not fit each other.
    """
    found = decoder.find(headers)
    mains, parts = {e.main: name for name, e in found.items()}, {p for e in found.values() for p in e.parts.values()}
    floats: dict[str, TensorSpec] = {}
    for key, spec in headers.items():
        if (name := mains.get(key)) is not None:
            floats[name] = TensorSpec(found[name].shape, torch.bfloat16)
        elif key not in parts and not is_unused(decoder, key):
            floats[key] = spec
    return floats


def is_unused(decoder: Decoder, key: str) -> bool:
    """Whether nothing is made of a tensor."""
    return bool(decoder.unused) and key.endswith(decoder.unused)


def decodable() -> str:
    """The methods, for sentences."""
    names: Iterable[str] = sorted(DECODERS)
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
