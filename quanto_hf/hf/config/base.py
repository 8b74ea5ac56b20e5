"""What every quantization config of ours answers, whatever format it is the config of; and the table of them."""

import copy
from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from quanto_hf.flow import Choice
from quanto_hf.io import INTERRUPTED, refuse_interrupted
from quanto_hf.io.decoders import Decoder
from quanto_hf.io.formats import FORMATS, Format
from quanto_hf.nn import QuantizedWeight

# of a config that asks for an empty model (hf/memory/skeleton.py): known to transformers only so that from_pretrained
# finds the quantizer that stops it; never saved
SKELETON_METHOD = "quanto_hf_skeleton"


class FormatConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of models in one format. The attributes below are what a format may be unable to
    say, with what it then means; a subclass has those that it can.

    A subclass takes the keys of a config.json for arguments, and has attributes of their names.
    """

    # the file side of the format
    format: ClassVar[Format]
    # The quantizer, as module and name: importing it takes 1 s, and transformers does it when it needs one.
    quantizer: ClassVar[str] = "quanto_hf.hf.load.quantizer.QuantoHfQuantizer"

    # number type to which inputs are rounded, and whether with one scale for all of them
    activations: str | None = None
    static_activations: bool = False
    # float weights in training, and learned scales
    qat: bool = False
    learn_scales: bool = False
    # plain layers with float weights
    dequantize: bool = False
    # patterns of modules, and what differs for those that match
    modules_to_not_convert: list[str] | None = None
    overrides: dict[str, dict[str, Any]] = {}  # noqa: RUF012
    default_skips: bool = True
    # flags that a config given for a quantized checkpoint has beyond the saved one: for after loading, and not saved
    asked: tuple[str, ...] = ()
    # what makes floats of a checkpoint of another method, for the quantizer; not saved
    decoder: Decoder | None = None

    @property
    def weights(self) -> str:
        """The name of how weights are stored, for tables."""
        raise NotImplementedError

    def choice(self) -> Choice:
        """What a module gets that nothing else is said of."""
        raise NotImplementedError

    def embeddings_choice(self) -> Choice | None:
        """What embeddings and the output head get; None leaves them in float."""
        return None

    def conflicts(self, other: Any) -> list[str]:
        """Names of the values, of those that decide how weights are stored, in which another config of this class
        contradicts this one."""
        return [] if self.choice().scheme() == other.choice().scheme() else ["weights"]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config of a dict, such as the ``quantization_config`` of a config.json.

        Raises:
            ValueError: a value is not allowed.
            CheckpointError: the folder holds files of two models, because a save was interrupted.
        """
        if INTERRUPTED in config_dict:
            refuse_interrupted(config_dict[INTERRUPTED])
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    @classmethod
    def of(cls, config: Any) -> Any:
        """A config of this class that says the same as one of another class for the same method."""
        return cls.from_dict(config.to_dict())

    @classmethod
    def of_layers(cls, layers: Mapping[str, QuantizedWeight]) -> Any:
        """A config that describes quantized layers, for a model that was not quantized as a whole.

        Raises:
            ValueError: none can describe them all.
        """
        raise ValueError(f"layers of the format {cls.format.method!r} cannot be described")

    def to_dict(self) -> dict[str, Any]:
        """The config in JSON types: the attributes of the subclass."""
        return copy.deepcopy({key: value for key, value in vars(self).items() if key not in _NEUTRAL})

    def left_in_float(self, model: nn.Module) -> list[str]:
        """Names of the modules that this config leaves in float by name."""
        return list(self.modules_to_not_convert or ())

    def hint(self) -> str:
        """Which values of a saved config decide what a layer holds, for the error of a checkpoint that does not fit; or
        an empty string."""
        return ""


# what every config has, and no file
_NEUTRAL = frozenset(FormatConfig.__annotations__)

CONFIGS: dict[str, type[FormatConfig]] = {}


def add_config(cls: type[FormatConfig]) -> None:
    """Make a format known by the class of its config."""
    FORMATS[cls.format.method] = cls.format
    CONFIGS[cls.format.method] = cls


def quantizer_class(config: FormatConfig) -> Any:
    """The class of the quantizer of a config."""
    module, _, name = config.quantizer.rpartition(".")
    return getattr(import_module(module), name)
