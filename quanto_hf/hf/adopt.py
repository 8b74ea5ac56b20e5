"""``quantize`` for models of transformers too: what it has quantized can be saved and loaded like any other."""

import sys
from typing import Any

from torch import nn

from quanto_hf import flow
from quanto_hf.hf.config import QuantoConfig


def quantize(model: nn.Module, weights: Any = "int8", activations: Any = None, **kwargs: Any) -> nn.Module:
    """As :func:`quanto_hf.flow.quantize`, whose arguments it takes. A model of transformers gets a quantizer as well,
    so that ``save_pretrained`` writes what ``from_pretrained`` loads: packed weights once it is frozen, and before
    that float ones with the state of training.

    Example:
        >>> import quanto_hf
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained(quanto_hf.tiny_lm())
        >>> quantize(model, weights="int4").hf_quantizer.is_qat_trainable
        True
    """
    transformers = sys.modules.get("transformers")
    adopted = transformers is not None and isinstance(model, transformers.PreTrainedModel)
    held: Any = getattr(model, "hf_quantizer", None)
    if adopted and held is not None:
        method = held.quantization_config.quant_method
        raise ValueError(f"{type(model).__name__} was loaded quantized, with {method}; quantize the float model")
    flow.quantize(model, weights, activations, **kwargs)
    if adopted:
        _adopt(model, weights, activations, kwargs)
    return model


def _adopt(model: Any, weights: Any, activations: Any, kwargs: dict[str, Any]) -> None:
    from quanto_hf.hf.quantizer import QuantoHfQuantizer
    from quanto_hf.hf.saving import save_whole_models

    fit = kwargs.get("optimizer")
    config = QuantoConfig(
        weights=getattr(weights, "name", weights),
        activations=getattr(activations, "name", activations),
        modules_to_not_convert=flow.as_patterns(kwargs.get("exclude")),
        group_size=kwargs.get("group_size"),
        symmetric=kwargs.get("symmetric"),
        fit=getattr(fit, "name", fit),
        overrides=dict(kwargs.get("overrides") or {}),
    )
    quantizer = QuantoHfQuantizer(config, pre_quantized=False)
    quantizer.describe(model)
    model.hf_quantizer = quantizer
    save_whole_models(type(model))
    model.config.quantization_config = quantizer.quantization_config
    model.is_quantized, model.quantization_method = True, quantizer.quantization_config.quant_method
