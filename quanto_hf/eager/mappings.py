"""Which module type becomes which, for each kind of quantization."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import type_before_parametrizations

from quanto_hf.eager import fused, modules, qat
from quanto_hf.eager.defaults import (
    default_fixed_qparams_range_0to1_fake_quant,
    default_fixed_qparams_range_neg1to1_fake_quant,
)
from quanto_hf.eager.stubs import DeQuantStub, QuantStub

__all__ = [
    "get_default_compare_output_module_list",
    "get_default_dynamic_quant_module_mappings",
    "get_default_float_to_quantized_operator_mappings",
    "get_default_qat_module_mappings",
    "get_default_qconfig_propagation_list",
    "get_default_static_quant_module_mappings",
    "get_default_static_quant_reference_module_mappings",
    "get_dynamic_quant_module_class",
    "get_embedding_qat_module_mappings",
    "get_embedding_static_quant_module_mappings",
    "get_quantized_operator",
    "get_static_quant_module_class",
]

Mapping = dict[type[nn.Module], type[nn.Module]]

_FLOAT: Mapping = {
    QuantStub: modules.Quantize,
    DeQuantStub: modules.DeQuantize,
    modules.FloatFunctional: modules.QFunctional,
    NonDynamicallyQuantizableLinear: modules.Linear,
    **{
        getattr(nn, name): getattr(modules, name)
        for name in (
            "BatchNorm2d", "BatchNorm3d", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d",
            "ConvTranspose3d", "Dropout", "ELU", "Embedding", "EmbeddingBag", "GroupNorm", "Hardswish",
            "InstanceNorm1d",
            "InstanceNorm2d", "InstanceNorm3d", "LayerNorm", "LeakyReLU", "Linear", "PReLU", "ReLU6",
        )
    },
}  # fmt: skip
_FUSED: Mapping = {
    getattr(fused, name): getattr(modules, name)
    for name in ("BNReLU2d", "BNReLU3d", "ConvReLU1d", "ConvReLU2d", "ConvReLU3d", "LinearReLU")
}
_TRAINED: Mapping = {
    getattr(qat, name): getattr(modules, target)
    for name, target in {
        "Conv1d": "Conv1d", "Conv2d": "Conv2d", "Conv3d": "Conv3d",
        "ConvBn1d": "Conv1d", "ConvBn2d": "Conv2d", "ConvBn3d": "Conv3d",
        "ConvBnReLU1d": "ConvReLU1d", "ConvBnReLU2d": "ConvReLU2d", "ConvBnReLU3d": "ConvReLU3d",
        "ConvReLU1d": "ConvReLU1d", "ConvReLU2d": "ConvReLU2d", "ConvReLU3d": "ConvReLU3d",
        "Linear": "Linear", "LinearBn1d": "Linear", "LinearReLU": "LinearReLU",
    }.items()
}  # fmt: skip
_STATIC: Mapping = {**_FLOAT, **_FUSED, **_TRAINED}
# functions of a known range: rounded if training has observed them, float otherwise
_KNOWN_RANGE: Mapping = {
    nn.Hardsigmoid: modules.Hardsigmoid,
    nn.Sigmoid: modules.Sigmoid,
    nn.Softmax: modules.Softmax,
    nn.Tanh: modules.Tanh,
}
_QAT: Mapping = {
    NonDynamicallyQuantizableLinear: qat.Linear,
    **{getattr(nn, name): getattr(qat, name) for name in ("Conv1d", "Conv2d", "Conv3d", "Linear")},
    **{
        getattr(fused, name): getattr(qat, name)
        for name in (
            "ConvBn1d", "ConvBn2d", "ConvBn3d", "ConvBnReLU1d", "ConvBnReLU2d", "ConvBnReLU3d", "ConvReLU1d",
            "ConvReLU2d", "ConvReLU3d", "LinearBn1d", "LinearReLU",
        )
    },
}  # fmt: skip
_DYNAMIC: Mapping = {
    nn.Linear: modules.DynamicLinear,
    NonDynamicallyQuantizableLinear: modules.DynamicLinear,
    qat.DynamicLinear: modules.DynamicLinear,
    fused.LinearReLU: modules.DynamicLinearReLU,
    **{
        getattr(nn, name): getattr(modules, name)
        for name in ("LSTM", "GRU", "LSTMCell", "GRUCell", "RNNCell", "Embedding", "EmbeddingBag")
    },
}
_SPECIAL: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Hardsigmoid: default_fixed_qparams_range_0to1_fake_quant,
    nn.Sigmoid: default_fixed_qparams_range_0to1_fake_quant,
    nn.Softmax: default_fixed_qparams_range_0to1_fake_quant,
    nn.Tanh: default_fixed_qparams_range_neg1to1_fake_quant,
}
_OPERATORS: dict[Callable[..., Any], type[nn.Module]] = {
    F.elu: modules.ELU,
    F.hardswish: modules.Hardswish,
    F.instance_norm: modules.InstanceNorm2d,
    F.layer_norm: modules.LayerNorm,
    F.leaky_relu: modules.LeakyReLU,
    F.dropout: modules.Dropout,
}


def get_default_static_quant_module_mappings() -> Mapping:
    """Float, fused and trained module type -> the module with a static output."""
    return {**_STATIC, **_KNOWN_RANGE}


def get_default_static_quant_reference_module_mappings() -> Mapping:
    """The same with modules that keep their float weight, and recurrent ones."""
    recurrent: Mapping = {kind: made for kind, made in _DYNAMIC.items() if issubclass(made, modules.StoredRecurrent)}
    return {
        kind: modules.as_reference(made) if hasattr(made, "is_reference") else made
        for kind, made in {**get_default_static_quant_module_mappings(), **recurrent}.items()
    }


def get_embedding_static_quant_module_mappings() -> Mapping:
    """The static mapping with embeddings that were trained with quantization."""
    trained: Mapping = {qat.Embedding: modules.Embedding, qat.EmbeddingBag: modules.EmbeddingBag}
    return {**get_default_static_quant_module_mappings(), **trained}


def get_default_qat_module_mappings() -> Mapping:
    """Float and fused module type -> the module for training with quantization."""
    return dict(_QAT)


def get_embedding_qat_module_mappings() -> Mapping:
    """The same with embeddings."""
    return {**_QAT, nn.Embedding: qat.Embedding, nn.EmbeddingBag: qat.EmbeddingBag}


def get_default_dynamic_quant_module_mappings() -> Mapping:
    """Float module type -> the module whose scales of activations are found when they pass."""
    return dict(_DYNAMIC)


def get_default_qconfig_propagation_list() -> set[type[nn.Module]]:
    """The module types that ``prepare`` observes, if they are leaves."""
    return {*_STATIC, *_QAT, *_DYNAMIC, nn.Sequential}


def get_default_compare_output_module_list() -> set[type[nn.Module]]:
    """The module types whose outputs are compared when accuracy is looked into."""
    kinds: set[type[nn.Module]] = {nn.Sequential}
    return kinds.union(*(part for mapping in (_STATIC, _QAT, _DYNAMIC) for part in (mapping, mapping.values())))


def get_default_float_to_quantized_operator_mappings() -> dict[Callable[..., Any], type[nn.Module]]:
    """Function -> the module that does the same with a rounded output. Functions cannot hold a scale."""
    return dict(_OPERATORS)


def get_static_quant_module_class(
    float_module_class: type[nn.Module],
    additional_static_quant_mapping: Mapping | None = None,
    is_reference: bool = False,
) -> type[nn.Module]:
    """The static module of a float module type.

    Args:
        float_module_class: a type.
        additional_static_quant_mapping: entries that count before the defaults.
        is_reference: the one that keeps its float weight.

    Raises:
        QConfigError: there is none.
    """
    get = (
        get_default_static_quant_reference_module_mappings if is_reference else get_default_static_quant_module_mappings
    )
    return _find(float_module_class, {**get(), **(additional_static_quant_mapping or {})})


def get_dynamic_quant_module_class(
    float_module_class: type[nn.Module], additional_dynamic_quant_mapping: Mapping | None = None
) -> type[nn.Module]:
    """The dynamic module of a float module type; see :func:`get_static_quant_module_class`."""
    return _find(float_module_class, {**_DYNAMIC, **(additional_dynamic_quant_mapping or {})})


def get_quantized_operator(float_op: Callable[..., Any]) -> type[nn.Module]:
    """The module that stands for a function.

    Raises:
        QConfigError: there is none.
    """
    return _find(float_op, _OPERATORS)


def _find(key: Any, mapping: dict[Any, type[nn.Module]]) -> type[nn.Module]:
    if key not in mapping:
        raise modules.QConfigError(
            f"{key} has no quantized counterpart; those that have one: {', '.join(map(str, mapping))}"
        )
    return mapping[key]


def special_observer(module: nn.Module) -> Callable[..., nn.Module] | None:
    """In training: the fake quantization of a function whose range is known, which counts before the qconfig."""
    return _SPECIAL.get(type_before_parametrizations(module)) if module.training else None
