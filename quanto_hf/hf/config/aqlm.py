"""The config of published AQLM checkpoints: AqlmConfig."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from quanto_hf.flow import Choice, first_match
from quanto_hf.hf.config.base import FormatConfig, add_config
from quanto_hf.io import INTERRUPTED, refuse_interrupted
from quanto_hf.io.formats import AQLM, Format
from quanto_hf.io.formats.aqlm import NOT_QUANTIZED, SIZES
from quanto_hf.nn import QuantizedWeight
from quanto_hf.schemes import Aqlm


class WrongType(TypeError, ValueError):
    """A value of another type: a TypeError to who calls :class:`AqlmConfig`, as transformers' own has it, and a
    ValueError to who loads a config.json."""


class AqlmConfig(FormatConfig):
    """The ``quantization_config`` of a checkpoint in the AQLM format, with the arguments and errors of transformers'.

    Args:
        in_group_size: columns that share a code.
        out_group_size: rows that share a code.
        num_codebooks: codes of a block.
        nbits_per_codebook: bits of a code.
        linear_weights_not_to_quantize: what stays float: names of parameters ("lm_head.weight"), as published
            checkpoints have, or names or patterns of modules ("lm_head").
        kwargs: other keys of a config.json, which are not looked at, but for the mark of an interrupted save.

    Raises:
        WrongType: a size is not an int; it is a TypeError and a ValueError.
        ValueError: ``linear_weights_not_to_quantize`` is not a list, or a size is out of range.
        CheckpointError: it is that of a folder into which a save was interrupted.

    Example:
        >>> AqlmConfig(num_codebooks=2, nbits_per_codebook=8, linear_weights_not_to_quantize=["lm_head.weight"]).weights
        'aqlm-2x8'
    """

    format: ClassVar[Format] = AQLM
    quantizer: ClassVar[str] = "quanto_hf.hf.load.aqlm.AqlmQuantizer"

    def __init__(
        self,
        in_group_size: int = 8,
        out_group_size: int = 1,
        num_codebooks: int = 1,
        nbits_per_codebook: int = 16,
        linear_weights_not_to_quantize: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if INTERRUPTED in kwargs:
            refuse_interrupted(kwargs[INTERRUPTED])
        self.quant_method = AQLM.method
        self.in_group_size = in_group_size
        self.out_group_size = out_group_size
        self.num_codebooks = num_codebooks
        self.nbits_per_codebook = nbits_per_codebook
        self.linear_weights_not_to_quantize = linear_weights_not_to_quantize
        self.post_init()

    def post_init(self) -> None:
        """Check the values."""
        for name in SIZES:
            value = getattr(self, name)
            if type(value) is not int:
                raise WrongType(f"{name} must be an int, not {value!r}")
        names = self.linear_weights_not_to_quantize
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"linear_weights_not_to_quantize must be a list of strings, not {names!r}")
        self.linear_weights_not_to_quantize = names or []
        self.scheme()

    def scheme(self) -> Aqlm:
        """How each weight is stored.

        Raises:
            ValueError: a size is out of range.
        """
        return AQLM.scheme(vars(self))

    def choice(self) -> Choice:
        """What every module gets that is quantized."""
        return Choice(self.scheme())

    def conflicts(self, other: "AqlmConfig") -> list[str]:
        """See :class:`FormatConfig`; an empty list of names contradicts none."""
        mine, others = (set(config.linear_weights_not_to_quantize or []) for config in (self, other))
        names = [NOT_QUANTIZED] if others and others != mine else []
        return [name for name in SIZES if getattr(self, name) != getattr(other, name)] + names

    @classmethod
    def of(cls, config: Any) -> "AqlmConfig":
        """See :class:`FormatConfig`."""
        return cls(**{name: getattr(config, name) for name in (*SIZES, NOT_QUANTIZED)})

    @classmethod
    def of_layers(cls, layers: Mapping[str, QuantizedWeight]) -> "AqlmConfig":
        """See :class:`FormatConfig`.

        Raises:
            ValueError: layers have several layouts.
        """
        scheme, *others = {layer.scheme for layer in layers.values()}
        if others:
            raise ValueError("others have another layout")
        assert isinstance(scheme, Aqlm)
        return cls(scheme.in_group, scheme.out_group, scheme.num_codebooks, scheme.nbits)

    def left_in_float(self, model: nn.Module) -> list[str]:
        """See :class:`FormatConfig`: the list names parameters or modules, with the prefix of the base model or not."""
        names, prefix = self.linear_weights_not_to_quantize or [], getattr(model, "base_model_prefix", "")
        return [
            name
            for name, module in model.named_modules()
            if type(module) is nn.Linear and (first_match(name, names) or first_match(f"{prefix}.{name}", names))
        ]

    def hint(self) -> str:
        """See :class:`FormatConfig`."""
        sizes = ", ".join(f"{name}={getattr(self, name)}" for name in SIZES)
        return f"config.json says {sizes}, and by {NOT_QUANTIZED} which layers have no codes"

    @property
    def weights(self) -> str:
        """The name of the layout, as a QuantoConfig takes it."""
        return f"aqlm-{self.num_codebooks}x{self.nbits_per_codebook}"

    def to_dict(self) -> dict[str, Any]:
        """The config in JSON types, with the keys of published checkpoints."""
        names = list(self.linear_weights_not_to_quantize or [])
        sizes = {name: getattr(self, name) for name in SIZES}
        return {"quant_method": self.quant_method, **sizes, NOT_QUANTIZED: names}


add_config(AqlmConfig)
