"""Replacing modules of a transformers model by empty quantized ones, before the weights come."""

import warnings
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from quanto_hf.fit import Fit
from quanto_hf.flow import Plan, activation_type, first_match, make_plan, replace_modules
from quanto_hf.hf.config import QuantoConfig
from quanto_hf.nn import QLayerNorm, QLinear
from quanto_hf.qtypes import QType
from quanto_hf.schemes import Scheme


def empty_qlinear(
    linear: nn.Linear, scheme: Scheme, activations: QType | None, fit: Fit | str | None, placeholder: bool
) -> QLinear:
    """A quantized layer on meta with the shapes of ``linear``.

    Args:
        linear: the layer that it stands for.
        scheme: how the weight is stored.
        activations: number type of the inputs, or None.
        fit: what finds scale and zero.
        placeholder: whether a float ``weight`` on meta waits for the tensor of a float checkpoint.
    """
    with init_empty_weights():
        layer = QLinear(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            scheme=scheme,
            activations=activations,
            dtype=linear.weight.dtype,
            device="meta",
        )
    layer.fit = fit
    if placeholder:
        empty = torch.empty((linear.out_features, linear.in_features), dtype=linear.weight.dtype, device="meta")
        layer._parameters["weight"] = nn.Parameter(empty, requires_grad=False)
    # transformers would read, and so dequantize, every weight to initialise it
    layer._is_hf_initialized = True  # type: ignore[assignment]
    return layer.train(linear.training)


def replace_by_plan(model: nn.Module, plan: Plan, activations: QType | None, placeholder: bool) -> None:
    """Put empty quantized modules where a plan wants them. In place."""
    made: dict[nn.Module, nn.Module] = {}
    for name, choice in plan.chosen.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        made[linear] = empty_qlinear(linear, choice.scheme(), activations, choice.fit, placeholder)
    for name in plan.norms:
        norm = model.get_submodule(name)
        assert isinstance(norm, nn.LayerNorm)
        made[norm] = QLayerNorm.from_module(norm, activations)
    replace_modules(model, made)
    for name, reason in plan.left.items():
        # read by flow.report
        model.get_submodule(name).quanto_hf_left = reason  # type: ignore[assignment]


def replace_with_quanto_layers(
    model: nn.Module,
    quantization_config: Any = None,
    modules_to_not_convert: list[str] | None = None,
    current_key_name: list[str] | None = None,
    has_been_replaced: bool = False,
) -> tuple[nn.Module, bool]:
    """Replace the linear layers of a model by empty quantized ones, in place; layer norms too where activations are
    quantized. The name, arguments and result are those of transformers' function for optimum-quanto.

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
    config = quantization_config if quantization_config is not None else QuantoConfig()
    if not isinstance(config, QuantoConfig):
        config = QuantoConfig(config.weights, config.activations, config.modules_to_not_convert)
    kind = activation_type(config.activations)
    exclude = [*(modules_to_not_convert or []), *(config.modules_to_not_convert or [])]
    prefix = "".join(f"{segment}." for segment in current_key_name or [])
    skip = {}
    if prefix:
        # the patterns are for the whole name
        for name, _ in model.named_modules():
            if (pattern := first_match(prefix + name, exclude)) is not None:
                skip[name] = f"it matches {pattern!r} of the modules not to convert"
        exclude = []
    plan = make_plan(model, config.choice(), activations=kind, exclude=exclude, skip=skip, overrides=config.overrides)
    replace_by_plan(model, plan, kind, placeholder=True)
    if not plan.chosen and not plan.norms:
        warnings.warn("no linear layer of this model has been replaced by a quantized one", stacklevel=2)
        return model, has_been_replaced
    return model, True
