"""What a user of transformers writes: QuantoConfig."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar

from quanto_hf.flow import OVERRIDABLE, Choice, activation_names, activation_type, embeddings_choice
from quanto_hf.hf.config.base import FormatConfig, add_config
from quanto_hf.hf.config.foreign_words import SHORT, hints, unknown_keywords
from quanto_hf.hf.config.values import value_problems
from quanto_hf.io import FORMAT_VERSION, INTERRUPTED, check_version, refuse_interrupted
from quanto_hf.io.formats import QUANTO, Format
from quanto_hf.nn import QuantizedInput, QuantizedWeight
from quanto_hf.qtypes import QType

METHOD = QUANTO.method

# keywords that the library writes
WRITTEN = ("format_version", "schemes", "quant_method")


@dataclass
class QuantoConfig(FormatConfig):
    """How ``from_pretrained`` quantizes a model.

    Args:
        weights: number type of the weights: int8, int4, int2, float8 (= float8_e4m3fn), float8_e5m2, nf4, fp4; or an
            AQLM layout: "aqlm-2x8" is 2 codebooks with codes of 8 bits.
        activations: None (weight-only), "int8" or "float8": also round the inputs of linear layers. The numbers are
            those of a quantized product. A scale belongs to a token; where int4 or int2 weights meet int8, to 32
            columns of it. docs/speed.md says where this is faster.
        static_activations: round inputs with one scale per layer, which :class:`quanto_hf.Calibration` finds; the model
            refuses to run before. Calibrating a model without it sets it. May be given for a quantized checkpoint that
            was saved without.
        qat: load float weights into layers that give what the packed ones would give, for quantization-aware training;
            :func:`quanto_hf.freeze` packs them. A quantized checkpoint has no float weights, and is refused.
        learn_scales: with ``qat``, train the scales as well. May be given for a checkpoint of training that was saved
            without.
        modules_to_not_convert: patterns of modules that stay float, besides the defaults (output and task heads,
            routers and gates of experts, tied weights, what the model keeps in float32). A pattern is a run of whole
            name segments or a glob: ``fc1`` does not match ``fc10``, ``*.down_proj`` does what it says.
        group_size: columns that share a scale: 16, 32, 64, 128, 256, or -1 for whole rows. None is the default of
            the type: whole rows for 8 bits, 64 for int4 and int2, 32 for nf4 and fp4. Of AQLM: columns that share a
            code, any number, 8 by default.
        symmetric: no zero point. None is the default of the type: False for int4 and int2, True for all others.
        fit: how scales are found: absmax, minmax, mse, mse_gain, hqq. None is the best data-free one of the type.
        overrides: pattern -> values of weights, group_size, symmetric and fit that differ for these modules, such as
            ``{"*.down_proj": {"weights": "int8"}}``; ``{"weights": None}`` leaves them in float. The first pattern
            that matches counts. One that names a router, a gate, an embedding, a head or a convolution itself
            (``mlp.gate``, not ``mlp``) quantizes it.
        default_skips: False also quantizes output and task heads, routers and gates. Tied weights stay float all the
            same, unless ``embeddings`` or an override asks for them.
        embeddings: number type of token, position and type embeddings and of the output head, with its default fit and
            group size (64 for int8); None leaves them in float. An embedding and a head with one weight (tied) are one
            packed tensor. Overrides that name one count more, for both sides of a tied pair.
        split_experts: save each expert of a mixture under a name of its own, as most published checkpoints and vLLM
            have them, and not all of a layer as one tensor. Both load again.
        dequantize: load with float weights in plain layers: those of the quantized checkpoint, or, of a float one,
            the weights rounded as they would be.
        format_version: format of the checkpoint; written by the library.
        schemes: resolved scheme of each module; written by the library.
        quant_method: "quanto_hf".

    Number types may also be given as :class:`quanto_hf.QType`, such as ``quanto_hf.qint4``; the config has their names.

    Raises:
        ValueError: lists every value that is not allowed, and the allowed ones.
        TypeError: a keyword is not known; the text says what to write in place of those of other tools.

    Example:
        >>> QuantoConfig(weights="int4", overrides={"*.down_proj": {"weights": "int8"}}).weights
        'int4'
    """

    weights: str = "int8"
    activations: str | None = None
    modules_to_not_convert: list[str] | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    fit: str | None = None
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    default_skips: bool = True
    split_experts: bool = False
    dequantize: bool = False
    static_activations: bool = False
    qat: bool = False
    learn_scales: bool = False
    embeddings: str | None = None
    format_version: int = FORMAT_VERSION
    schemes: list[dict[str, Any]] | None = None
    # keyword only: the base class has it first, but the first argument is the weights, as in transformers' QuantoConfig
    quant_method: str = field(default=METHOD, kw_only=True)

    format: ClassVar[Format] = QUANTO

    def __post_init__(self) -> None:
        self.overrides = {} if self.overrides is None else self.overrides
        self._name_types()
        problems = self._problems()
        if problems:
            raise ValueError("this QuantoConfig cannot be used:\n  " + "\n  ".join(problems))
        check_version(self.format_version)

    def _name_types(self) -> None:
        """Names in the place of number types: a config is written as JSON."""
        self.weights, self.activations = as_name(self.weights), as_name(self.activations)
        self.embeddings = as_name(self.embeddings)
        if isinstance(self.overrides, Mapping):
            self.overrides = {
                pattern: {key: as_name(value) for key, value in values.items()}
                if isinstance(values, Mapping)
                else values
                for pattern, values in self.overrides.items()
            }

    def _problems(self) -> list[str]:
        """One sentence for each bad value."""
        problems = value_problems(vars(self), self.weights)
        if self.embeddings is not None:
            found = value_problems({"weights": self.embeddings}, self.embeddings, may_be_float=True)
            problems += [f"embeddings{problem.removeprefix('weights')}" for problem in found]
        if self.quant_method not in (METHOD, "quanto"):
            problems.append(f"quant_method={SHORT.repr(self.quant_method)}; it is {METHOD!r}")
        try:
            activation_type(self.activations)
        except ValueError:
            problems.append(f"activations={SHORT.repr(self.activations)}; choose None, {', '.join(activation_names())}")
        names = self.modules_to_not_convert
        if names is not None and not (isinstance(names, list | tuple) and all(isinstance(n, str) for n in names)):
            problems.append(f"modules_to_not_convert={SHORT.repr(names)}; give a list of names or patterns, or None")
        for flag in ("default_skips", "split_experts", "dequantize", "static_activations", "qat", "learn_scales"):
            if not isinstance(getattr(self, flag), bool):
                problems.append(f"{flag}={SHORT.repr(getattr(self, flag))}; choose True or False")
        if not isinstance(self.overrides, Mapping):
            return [*problems, f"overrides={SHORT.repr(self.overrides)}; give a dict of pattern -> values"]
        for pattern, values in self.overrides.items():
            if not isinstance(values, Mapping):
                problems.append(
                    f"overrides[{pattern!r}]={SHORT.repr(values)}; give a dict such as {{'weights': 'int8'}}"
                )
                continue
            where = f"overrides[{pattern!r}]: "
            problems += [
                f"{where}{key!r} is not known; choose {', '.join(OVERRIDABLE)}" for key in set(values) - {*OVERRIDABLE}
            ]
            problems += [
                where + problem for problem in value_problems(values, values.get("weights", self.weights), True)
            ]
        if not problems:
            problems = self._combination_problems()
        return problems

    def _combination_problems(self) -> list[str]:
        """Values that are fine alone and do not go together."""
        problems = []
        if self.static_activations and self.activations is None:
            problems.append("static_activations=True without activations; add activations='int8' or 'float8'")
        if self.qat and self.dequantize:
            problems.append("qat=True and dequantize=True; choose one of them")
        if self.learn_scales and not self.qat:
            problems.append("learn_scales=True without qat=True; scales are learned in training only")
        special = [] if (choice := self.embeddings_choice()) is None else [("embeddings: ", choice)]
        for where, choice in [("", self.choice()), *special, *self._override_choices()]:
            # of a checkpoint that is quantized nothing is fitted any more
            asked = choice if self.schemes is None or self.qat else replace(choice, fit=None)
            if (reason := asked.refusal()) is not None:
                problems.append(where + reason)
            elif self.qat and (reason := choice.scheme().refuses_training()) is not None:
                problems.append(f"{where}qat=True does not work with {choice.weights} weights: {reason}")
            elif self.learn_scales and self.qat and (reason := choice.scheme().refuses_learning()) is not None:
                problems.append(where + reason)
        return problems

    def _override_choices(self) -> list[tuple[str, Choice]]:
        return [
            (f"overrides[{pattern!r}]: ", self.choice().override(values))
            for pattern, values in self.overrides.items()
            if values.get("weights", "") is not None
        ]

    def choice(self) -> Choice:
        """What a module gets that no override names."""
        return Choice(self.weights, self.group_size, self.symmetric, self.fit)

    def embeddings_choice(self) -> Choice | None:
        """See :class:`FormatConfig`."""
        return None if self.embeddings is None else embeddings_choice(self.embeddings)

    @classmethod
    def of(cls, config: Any) -> "QuantoConfig":
        """See :class:`FormatConfig`: of transformers' class for optimum-quanto."""
        return cls(config.weights, config.activations, config.modules_to_not_convert)

    @classmethod
    def of_layers(cls, layers: Mapping[str, QuantizedWeight]) -> "QuantoConfig":
        """See :class:`FormatConfig`: the scheme of most layers; that of each is in 'schemes'."""
        rounded = [
            layer.activations for layer in layers.values() if isinstance(layer, QuantizedInput) and layer.rounds_inputs
        ]
        activations = rounded[0].name if rounded and rounded[0] is not None else None
        scheme = Counter(layer.scheme for layer in layers.values()).most_common(1)[0][0]
        return cls(activations=activations, **scheme.asked())

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> "QuantoConfig | tuple[QuantoConfig, dict[str, Any]]":
        """The config of a dict, such as the ``quantization_config`` of a config.json.

        Raises:
            ValueError: a key is not known, or a value is not allowed.
            CheckpointError: the folder holds files of two models, because a save was interrupted.
        """
        if INTERRUPTED in config_dict:
            refuse_interrupted(config_dict[INTERRUPTED])
        known = {f.name for f in fields(cls)}
        # of a newer version there may be keys that are not known here
        check_version(config_dict.get("format_version", FORMAT_VERSION))
        unknown = sorted(set(config_dict) - known)
        if unknown:
            advice = hints({key: config_dict[key] for key in unknown}, known)
            raise ValueError(
                f"unknown keys in the quantization config: {', '.join(unknown)}; known are {', '.join(sorted(known))}"
                + (f"; write {'; '.join(advice)}" if advice else "")
            )
        config = cls(**config_dict)
        unused = config.update(**kwargs)
        config.__post_init__()
        return (config, unused) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The config in JSON types."""
        return asdict(self)

    def conflicts(self, other: "QuantoConfig") -> list[str]:
        """Names of the values, of those that decide how weights are stored, in which two configs differ."""
        mine, others = self._resolved(), other._resolved()
        # another number type has another default group size: that the types differ says it all
        return [name for name in mine if mine[name] != others[name] and getattr(self, name) != getattr(other, name)]

    def _resolved(self) -> dict[str, Any]:
        """The values that decide how weights are stored, the same for two ways to write the same."""
        asked = self.choice().scheme().asked()
        return {
            "weights": asked["weights"],
            "activations": activation_type(self.activations),
            "group_size": asked["group_size"],
            "symmetric": asked.get("symmetric", True),
            "fit": self.fit,
            "overrides": self.overrides,
            "modules_to_not_convert": sorted(self.modules_to_not_convert or []),
            "default_skips": self.default_skips,
            "embeddings": None if (choice := self.embeddings_choice()) is None else choice.scheme(),
        }


def as_name(value: Any) -> Any:
    """The name of a number type; anything else as it is."""
    return value.name if isinstance(value, QType) else value


def _known_keywords_only(init: Callable[..., None]) -> Callable[..., None]:
    """``__init__`` with a sentence for the keywords of other tools, and the same signature."""

    @functools.wraps(init)
    def checked(self: QuantoConfig, *args: Any, **kwargs: Any) -> None:
        known = [f.name for f in fields(QuantoConfig)]
        unknown = {name: value for name, value in kwargs.items() if name not in known}
        if unknown:
            raise TypeError(unknown_keywords("QuantoConfig", unknown, [n for n in known if n not in WRITTEN]))
        init(self, *args, **kwargs)

    return checked


QuantoConfig.__init__ = _known_keywords_only(QuantoConfig.__init__)  # type: ignore[method-assign]
add_config(QuantoConfig)
