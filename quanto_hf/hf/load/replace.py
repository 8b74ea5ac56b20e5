"""Replacing modules of a transformers model by empty quantized ones, before the weights come."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from quanto_hf.flow import (
    Assignment,
    Choice,
    activation_type,
    assign,
    by_module,
    first_match,
    note_reasons,
    quantized_by,
    refuse_other_dtypes,
    replace_modules,
)
from quanto_hf.hf.config.quanto import QuantoConfig
from quanto_hf.hf.config.refusals import refuse_no_config
from quanto_hf.nn import QuantizedInput, QuantizedWeight
from quanto_hf.nn.learned import LearnedScales
from quanto_hf.nn.slots import module_at


def empty_module(
    module: nn.Module,
    choices: Mapping[str, Choice],
    config: Any,
    pre_quantized: bool,
    cls: type[QuantizedWeight] | None = None,
) -> QuantizedWeight:
    """The quantized module of a float one, on meta, with the parameters that a checkpoint fills.

    Args:
        module: on meta; it is not changed.
        choices: slot name -> how it is stored.
        config: what happens to inputs, and whether the weight stays float for training.
        pre_quantized: whether the checkpoint is quantized. Of a float one a float parameter on meta waits in each
            slot for the tensor, and what training or calibration add comes after loading (:func:`finish_prepared`).
        cls: class of the module; None is the registered one.
    """
    static = config.static_activations and pre_quantized
    # without accelerate's init_empty_weights, which is one of the process: what other threads make lands on meta too
    layer = quantized_by(module, choices, activation_type(config.activations), static, cls)
    empty = {slot.name: torch.empty(slot.shape, dtype=layer.weight_dtype, device="meta") for slot in layer.slots}
    layer.make_empty()
    for name, parameter in layer._parameters.items():
        # of a module that is not on meta itself, and keeps its own
        if parameter is not None and parameter.device.type != "meta":
            layer._parameters[name] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    if config.qat:
        for name in layer.stored_names:
            del layer._parameters[name]
        # first, as in the float module
        layer._parameters = {**{name: nn.Parameter(tensor) for name, tensor in empty.items()}, **layer._parameters}
        if config.learn_scales and pre_quantized:
            assert isinstance(layer, LearnedScales)
            layer.expect_learned()
    elif not pre_quantized:
        layer._parameters.update({name: nn.Parameter(tensor, False) for name, tensor in empty.items()})
    # transformers would read, and so dequantize, every weight to initialise it; but buffers that are in no file are
    # made there and nowhere else: those of scaled embeddings (a view of a packed weight has the mark itself)
    layer._is_hf_initialized = not layer._non_persistent_buffers_set  # type: ignore[assignment]
    return layer


def finish_prepared(layer: QuantizedWeight, config: QuantoConfig) -> None:
    """Give a layer whose float weight has been loaded what training needs besides."""
    for slot in layer.slots:
        weight = layer.get_parameter(slot.name)
        weight.requires_grad_(True)
    if config.static_activations and isinstance(layer, QuantizedInput) and layer.rounds_inputs and not layer.is_static:
        layer.make_static(device=weight.device)
    if config.learn_scales and isinstance(layer, LearnedScales) and not layer.learns:
        layer.learn_scales()


def replace_by_assignment(
    model: nn.Module, assignment: Assignment, config: Any, pre_quantized: bool, cls: type[QuantizedWeight] | None = None
) -> None:
    """Put empty quantized modules where an assignment wants them. In place.

    Raises:
        ValueError: a weight is in float64 or another dtype that cannot be quantized. Nothing has been changed then.
    """
    refuse_other_dtypes(model, assignment.chosen)
    made: dict[nn.Module, nn.Module] = {}
    for name, choices in by_module(model, assignment.chosen).items():
        module = module_at(model, name)
        made[module] = empty_module(module, choices, config, pre_quantized, cls)
    replace_modules(model, made)
    note_reasons(model, assignment)


def replace_with_quanto_layers(
    model: nn.Module,
    quantization_config: Any = None,
    modules_to_not_convert: list[str] | None = None,
    current_key_name: list[str] | None = None,
    has_been_replaced: bool = False,
) -> tuple[nn.Module, bool]:
    """Replace the linear layers of a model by empty quantized ones, in place. The name, arguments and result are those
    of transformers' function for optimum-quanto.

    Args:
        model: a model, usually on meta. Nothing is skipped by default here.
        quantization_config: a :class:`QuantoConfig`, or transformers' own; None is ``QuantoConfig()``.
        modules_to_not_convert: patterns of modules that stay float.
        current_key_name: segments of the name of ``model`` inside a larger one; patterns see the whole name.
        has_been_replaced: what is returned if nothing is replaced.

    Returns:
        The model itself, and whether anything has been replaced.

    Example:
        >>> model, replaced = replace_with_quanto_layers(nn.Sequential(nn.Linear(8, 8)), QuantoConfig(weights="int8"))
        >>> replaced, model[0].weight_packed.device.type
        (True, 'meta')
    """
    refuse_no_config(quantization_config)
    config = quantization_config if quantization_config is not None else QuantoConfig()
    if not isinstance(config, QuantoConfig):
        config = QuantoConfig.of(config)
    exclude = [*(modules_to_not_convert or []), *(config.modules_to_not_convert or [])]
    prefix = "".join(f"{segment}." for segment in current_key_name or [])
    skip = {}
    if prefix:
        # the patterns are for the whole name
        for name, _ in model.named_modules():
            if (pattern := first_match(prefix + name, exclude)) is not None:
                skip[name] = f"it matches {pattern!r} of the modules not to convert"
        exclude = []
    assignment = assign(model, config.choice(), exclude=exclude, skip=skip, overrides=config.overrides)
    replace_by_assignment(model, assignment, config, pre_quantized=False)
    if not assignment.chosen:
        warnings.warn("no linear layer of this model has been replaced by a quantized one", stacklevel=2)
        return model, has_been_replaced
    return model, True
