"""Models in the published AQLM format: loaded, made and saved without the ``aqlm`` package."""

import warnings
from typing import Any

from torch import nn

from quanto_hf.flow import Assignment, Choice, assign, first_match
from quanto_hf.hf.config.aqlm import AqlmConfig
from quanto_hf.hf.config.skips import default_skips, other_kinds
from quanto_hf.hf.load.quantizer import QuantoHfQuantizer
from quanto_hf.hf.load.replace import replace_by_assignment
from quanto_hf.hf.load.ties import float_ties
from quanto_hf.nn import QuantizedLinear


def read_assignment(
    model: nn.Module, config: AqlmConfig, names: list[str], prefixes: tuple[str, ...] = ("",), skip: Any = None
) -> Assignment:
    """Which linear layers have codes in a model that is made in this format, or read.

    Args:
        model: usually on meta.
        config: the layout.
        names: what stays float: names of parameters, or names or patterns of modules.
        prefixes: what may stand before a name of ``model`` in the list.
        skip: module name -> another reason why it stays float.

    Raises:
        ValueError: the weight of a layer cannot be cut into blocks; the text names the layer.
    """
    # the same layers for every layout: what can be read is more than what can be made
    skip = {**(skip or {}), **other_kinds(model, QuantizedLinear), **_named(model, names, prefixes)}
    assignment = assign(model, Choice("int8"), skip=skip, ties=float_ties(model))
    problems = []
    for name in assignment.chosen:
        layer, assignment.chosen[name] = model.get_submodule(name), config.choice()
        assert isinstance(layer, nn.Linear)
        if (reason := config.scheme().refuses((layer.out_features, layer.in_features))) is not None:
            problems.append(f"{name}: {reason}")
    if problems:
        raise ValueError("the model cannot have AQLM weights of this layout:\n  " + "\n  ".join(problems))
    return assignment


def _named(model: nn.Module, names: list[str], prefixes: tuple[str, ...]) -> dict[str, str]:
    """Name of a module -> the reason why it stays float, of those that a list names by parameter or by module."""
    found = {
        name: next((match for prefix in prefixes if (match := first_match(prefix + name, names)) is not None), None)
        for name, _ in model.named_modules()
    }
    return {name: f"{match!r} is not to be quantized" for name, match in found.items() if match is not None}


def replace_with_aqlm_linear(
    model: nn.Module,
    quantization_config: Any = None,
    linear_weights_not_to_quantize: list[str] | None = None,
    current_key_name: list[str] | None = None,
    has_been_replaced: bool = False,
) -> tuple[nn.Module, bool]:
    """Replace the linear layers of a model by empty :class:`quanto_hf.nn.QuantizedLinear` ones, in place.

    Args:
        model: a model, usually on meta.
        quantization_config: an :class:`AqlmConfig`, or transformers' own; None is ``AqlmConfig()``.
        linear_weights_not_to_quantize: what stays float besides what the config names: parameters ("lm_head.weight") or
            modules ("lm_head").
        current_key_name: segments of the name of ``model`` inside a larger one, to which these names refer.
        has_been_replaced: what is returned if nothing is replaced.

    Returns:
        The model itself, and whether anything has been replaced.

    Raises:
        ValueError: the weight of a layer cannot be cut into blocks; the text names the layer. Nothing is changed then.

    Example:
        >>> config = AqlmConfig(num_codebooks=2, nbits_per_codebook=8)
        >>> model, replaced = replace_with_aqlm_linear(nn.Sequential(nn.Linear(16, 4)), config)
        >>> replaced, model[0].codes.device.type
        (True, 'meta')
    """
    config = AqlmConfig.of(quantization_config if quantization_config is not None else AqlmConfig())
    names = [*(linear_weights_not_to_quantize or []), *(config.linear_weights_not_to_quantize or [])]
    assignment = read_assignment(model, config, names, ("".join(f"{segment}." for segment in current_key_name or []),))
    replace_by_assignment(model, assignment, config, True, QuantizedLinear)
    for name in assignment.chosen:
        model.get_submodule(name).requires_grad_(False)
    if not assignment.chosen:
        warnings.warn("no linear layer of this model has been replaced by an AQLM one", stacklevel=2)
        return model, has_been_replaced
    return model, True


class AqlmQuantizer(QuantoHfQuantizer):
    """Loads a model in the AQLM format, or makes one of a float model, without data. The config of this format names
    the layers that are not quantized, not those that are.

    Args:
        quantization_config: an :class:`AqlmConfig`, or transformers' own.
        pre_quantized: whether the checkpoint is quantized.
    """

    def _saved_assignment(self, model: Any) -> Assignment:
        names, skips = self.quantization_config.linear_weights_not_to_quantize, default_skips(model, self._dtype, False)
        return read_assignment(model, self.quantization_config, names, _prefixes(model), skips)

    def _new_assignment(self, model: Any) -> Assignment:
        config = self.quantization_config
        named = _named(model, config.linear_weights_not_to_quantize, _prefixes(model))
        skip = {**default_skips(model, self._dtype), **other_kinds(model, QuantizedLinear), **named}
        return assign(model, config.choice(), skip=skip, ties=float_ties(model))


def _prefixes(model: Any) -> tuple[str, ...]:
    """AutoModel loads what AutoModelForCausalLM saved, whose names have a prefix."""
    return ("", f"{model.base_model_prefix}.") if model.base_model_prefix else ("",)
