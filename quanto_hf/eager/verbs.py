"""Whole workflows in one call."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from quanto_hf.eager.convert import Classes, convert
from quanto_hf.eager.defaults import (
    default_dynamic_qconfig,
    float16_dynamic_qconfig,
    float_qparams_weight_only_qconfig,
    float_qparams_weight_only_qconfig_4bit,
)
from quanto_hf.eager.mappings import get_default_dynamic_quant_module_mappings, get_default_qat_module_mappings
from quanto_hf.eager.modules import QConfigError
from quanto_hf.eager.prepare import prepare
from quanto_hf.eager.propagate import propagate_qconfig_
from quanto_hf.eager.qconfig import QConfig
from quanto_hf.nn.observers import dtype_name

__all__ = ["prepare_qat", "quantize", "quantize_dynamic", "quantize_qat"]

_RECURRENT = (nn.Linear, nn.LSTM, nn.GRU, nn.LSTMCell, nn.RNNCell, nn.GRUCell)
_DYNAMIC: dict[str, tuple[QConfig, tuple[type[nn.Module], ...]]] = {
    "qint8": (default_dynamic_qconfig, _RECURRENT),
    "int8": (default_dynamic_qconfig, _RECURRENT),
    "float16": (float16_dynamic_qconfig, _RECURRENT),
    "quint8": (float_qparams_weight_only_qconfig, (nn.Embedding, nn.EmbeddingBag)),
    "uint8": (float_qparams_weight_only_qconfig, (nn.Embedding, nn.EmbeddingBag)),
    "quint4x2": (float_qparams_weight_only_qconfig_4bit, (nn.EmbeddingBag,)),
}


def quantize(
    model: nn.Module,
    run_fn: Callable[..., Any],
    run_args: Iterable[Any],
    mapping: Classes | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Static quantization: ``prepare``, run the model on data, ``convert``.

    Args:
        model: with qconfigs.
        run_fn: called as ``run_fn(model, *run_args)`` with the prepared model in eval mode.
        run_args: its other arguments.
        mapping: see :func:`convert`.
        inplace: change the model, and not a copy.

    Returns:
        The quantized model.

    Raises:
        RuntimeError: ``run_fn`` has not run some module that is to be quantized.

    Example:
        >>> from quanto_hf.eager import QuantWrapper, default_qconfig
        >>> model = QuantWrapper(nn.Linear(4, 2))
        >>> model.qconfig = default_qconfig
        >>> quantize(model, lambda model, x: model(x), [torch.randn(8, 4)]).module
        Linear(in_features=4, out_features=2, bias=True, weights=int8, output=quint8, scale=..., zero_point=...)
    """
    if not inplace:
        model = copy.deepcopy(model)
    model = prepare(model.eval(), inplace=True)
    run_fn(model, *run_args)
    return convert(model, mapping, inplace=True)


def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: Mapping[Any, QConfig | None] | set[Any] | None = None,
    dtype: Any = "qint8",
    mapping: Classes | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Quantize weights, and inputs of linear layers with scales that are found when they pass. No data is needed.

    Args:
        model: any model.
        qconfig_spec: name or type of a module -> QConfig; or a set of names and types, which get the qconfig of
            ``dtype``; None is the types of ``dtype``: Linear, LSTM, GRU and the cells for int8 and float16, Embedding
            and EmbeddingBag for "quint8", EmbeddingBag for "quint4x2".
        dtype: "qint8" or "int8", "float16", "quint8", "quint4x2", or the torch dtype of that name. It means nothing
            if ``qconfig_spec`` is a dict.
        mapping: module type -> class with ``from_float``; None is the dynamic mapping.
        inplace: change the model, and not a copy.

    Returns:
        The quantized model in eval mode.

    Raises:
        ValueError: the dtype is not known.

    Example:
        >>> quantize_dynamic(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), dtype="int8")[0]
        DynamicLinear(in_features=4, out_features=2, bias=True, weights=int8, activations=int8)
    """
    rules: dict[Any, QConfig | None]
    if isinstance(qconfig_spec, Mapping):
        rules = dict(qconfig_spec)
    else:
        name = dtype_name(dtype)
        if name not in _DYNAMIC:
            raise ValueError(
                f"dtype={name!r} has no default qconfig; choose one of {', '.join(_DYNAMIC)}, or give a dict"
            )
        qconfig, kinds = _DYNAMIC[name]
        rules = dict.fromkeys(kinds if qconfig_spec is None else qconfig_spec, qconfig)
    if not inplace:
        model = copy.deepcopy(model)
    propagate_qconfig_(model.eval(), rules)
    return convert(model, get_default_dynamic_quant_module_mappings() if mapping is None else mapping, inplace=True)


def prepare_qat(model: nn.Module, mapping: Classes | None = None, inplace: bool = False) -> nn.Module:
    """Let a model round its weights and activations while it is trained.

    Args:
        model: in training mode, with qconfigs of fake quantizations.
        mapping: float module type -> class for training; None is :func:`get_default_qat_module_mappings`.
        inplace: change the model, and not a copy.

    Returns:
        The model to train. Its parameters are those of the model, or of the copy.

    Raises:
        QConfigError: the model is not in training mode.
        ValueError: dynamic quantization was asked for with an observer that has a memory.
    """
    if not model.training:
        raise QConfigError("prepare_qat only works on models in training mode: call model.train() first")
    mapping = get_default_qat_module_mappings() if mapping is None else mapping
    if not inplace:
        model = copy.deepcopy(model)
    propagate_qconfig_(model)
    model = convert(model, mapping, inplace=True, remove_qconfig=False)
    return prepare(model, inplace=True, observer_non_leaf_module_list=set(mapping.values()))


def quantize_qat(
    model: nn.Module, run_fn: Callable[..., Any], run_args: Iterable[Any], inplace: bool = False
) -> nn.Module:
    """Training with quantization: ``prepare_qat``, train, ``convert``.

    Args:
        model: with qconfigs of fake quantizations.
        run_fn: called as ``run_fn(model, *run_args)`` with the prepared model in training mode; trains it.
        run_args: its other arguments.
        inplace: change the model, and not a copy.

    Returns:
        The quantized model in eval mode.
    """
    if not inplace:
        model = copy.deepcopy(model)
    model = prepare_qat(model.train(), inplace=True)
    run_fn(model, *run_args)
    return convert(model.eval(), inplace=True)
