"""Published AQLM checkpoints: one layout for the whole model, and a list of the parameters that are not in it."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from quanto_hf.io.formats.base import Format
from quanto_hf.nn import QuantizedLinear, QuantizedWeight
from quanto_hf.schemes import Aqlm, Scheme, TensorSpec

# key of the config -> its default, in the order of the arguments of AqlmConfig
SIZES = {"in_group_size": 8, "out_group_size": 1, "num_codebooks": 1, "nbits_per_codebook": 16}
NOT_QUANTIZED = "linear_weights_not_to_quantize"


class AqlmFormat(Format):
    """The format of the ``aqlm`` package. It has no version, and its config does not name the quantized modules."""

    method: ClassVar[str] = "aqlm"
    keys: ClassVar[frozenset[str]] = frozenset(SIZES)
    prefix: ClassVar[str] = ""
    layer: ClassVar[type[QuantizedWeight]] = QuantizedLinear
    # in published files hardly anything begins at a cache line; in those that are saved here nearly everything does
    copies_floats: ClassVar[bool] = False
    # transformers has a quantizer of its own for this method
    spoiled: ClassVar[Mapping[str, Any]] = {"num_codebooks": "an interrupted save"}

    def part_of(self, leaf: str) -> str | None:
        return leaf if leaf in ("codes", "codebooks", "scales") else None

    def scheme(self, config: Mapping[str, Any]) -> Aqlm:
        """The layout of every weight.

        Raises:
            ValueError: a size is out of range.
        """
        columns, rows, books, bits = (config.get(key, default) for key, default in SIZES.items())
        try:
            return Aqlm(books, bits, rows, columns)
        except ValueError as error:
            sizes = ", ".join(f"{key}={config[key]!r}" for key in SIZES if key in config)
            raise ValueError(f"{error} ({sizes})") from None

    def schemes(self, config: Mapping[str, Any], headers: Mapping[str, TensorSpec]) -> dict[str, Scheme]:
        """The scheme of each module that has one of the stored tensors in ``headers``."""
        scheme = self.scheme(config)
        owners = (name.rpartition(".") for name in headers)
        return {owner: scheme for owner, dot, leaf in owners if dot and self.part_of(leaf) is not None}

    def describe(self, model: nn.Module, loaded: bool) -> dict[str, Any]:
        """The list of float parameters, for a model that was not in this format before."""
        if loaded:
            return {}
        stored = {
            f"{name}.{leaf}"
            for name, module in model.named_modules()
            if isinstance(module, QuantizedWeight)
            for leaf in (*module.stored_names, "bias")
        }
        return {NOT_QUANTIZED: [name for name in model.state_dict() if name not in stored]}
