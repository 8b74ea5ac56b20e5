"""What a format is: what a saved model has in config.json, and what the stored tensors of a layer are called."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from quanto_hf.nn import QuantizedWeight
from quanto_hf.schemes import Scheme, TensorSpec

# the key in the metadata of files in another format than ours, and what they have there
WRITER_KEY, WRITER = "written_by", "quanto_hf"


class Format(ABC):
    """One way to save a quantized model. Its config, which transformers sees, is a
    :class:`quanto_hf.hf.config.base.FormatConfig`. Add a format: docs/architecture.md.

    A subclass has a ``method``, and answers at least :meth:`schemes` and :meth:`describe`.
    """

    # quant_method in config.json
    method: ClassVar[str]
    # keys of the quantization config that no other format has together: by them it is known whatever its method says
    keys: ClassVar[frozenset[str]] = frozenset()
    # what stands before the name of a stored tensor in a layer: "weight_" in up_proj.weight_packed
    prefix: ClassVar[str] = "weight_"
    # class of the linear layers that hold such weights; None is the registered class of each module type
    layer: ClassVar[type[QuantizedWeight] | None] = None
    # whether each packed weight has an empty tensor under the name of the float one beside it
    guarded: ClassVar[bool] = False
    # Whether a float tensor that does not begin at a cache line is copied: the product of another place has other last
    # bits. False where files come from programs that do not align tensors.
    copies_floats: ClassVar[bool] = True

    # What a config has in it while a save into its folder is interrupted, for programs that read this format and do not
    # know the mark for that: they refuse these values.
    spoiled: ClassVar[Mapping[str, Any]] = {}

    def part_of(self, leaf: str) -> str | None:
        """The stored tensor that a tensor of a layer is by its name ("packed" for ``weight_packed``), or None."""
        return leaf.removeprefix(self.prefix) if self.prefix and leaf.startswith(self.prefix) else None

    def version(self, config: Mapping[str, Any]) -> int | None:
        """The version that a saved config says; None of a format without versions.

        Raises:
            ValueError: it cannot be read.
        """
        return None

    def refuses_saved(self, config: Mapping[str, Any]) -> str | None:
        """Why a saved config does not say all that loading needs, or None."""
        return None

    @abstractmethod
    def schemes(self, config: Mapping[str, Any], headers: Mapping[str, TensorSpec]) -> dict[str, Scheme]:
        """How the weight of each quantized module is stored.

        Args:
            config: the saved quantization config.
            headers: of all files, by the names there; empty where a model is loaded, before its files are read.

        Returns:
            Module name -> scheme; names as they were in the model that was saved.

        Raises:
            ValueError: the config cannot be used.
        """

    @abstractmethod
    def describe(self, model: nn.Module, loaded: bool) -> dict[str, Any]:
        """The values of the quantization config that follow from the layers of a model, in JSON types.

        Args:
            model: with its quantized layers.
            loaded: whether it comes from a checkpoint in this format, and has the values of that.
        """

    def metadata(self) -> dict[str, str]:
        """What the header of each file says, by which :mod:`quanto_hf.io.shard_writer` writes it. Not empty."""
        return {WRITER_KEY: WRITER}
