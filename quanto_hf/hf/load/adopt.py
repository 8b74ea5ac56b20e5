"""``quantize`` for models of transformers too: what it has quantized can be saved and loaded like any other."""

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from quanto_hf import flow
from quanto_hf.fit import Fit, name_of_fit
from quanto_hf.hf.config.foreign_words import unknown_keywords
from quanto_hf.hf.config.quanto import QuantoConfig
from quanto_hf.hf.load.gguf import forget_gguf, is_float_gguf, refuse_gguf_blocks
from quanto_hf.hf.save.other_savers import watch_other_savers
from quanto_hf.hf.save.saving import watch_saving
from quanto_hf.qtypes import QType

KEYWORDS = tuple(inspect.signature(flow.quantize).parameters)[1:]


def quantize(model: nn.Module, weights: Any = "int8", activations: Any = None, **kwargs: Any) -> nn.Module:
    """As :func:`quanto_hf.flow.quantize`, whose arguments it takes. A model of transformers gets a quantizer as well,
    so that ``save_pretrained`` writes what ``from_pretrained`` loads: packed weights once it is frozen, and before
    that float ones with the state of training. Only a fit that no name finds (``HqqOptimizer(p=0.5)``, or one of the
    user's own) is not saved: what is trained on after a reload has the default one.

    A model that ``from_pretrained(..., gguf_file=...)`` has read with float weights is a float model here.

    Example:
        >>> import quanto_hf
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained(quanto_hf.tiny_lm())
        >>> quantize(model, weights="int4").hf_quantizer.is_qat_trainable
        True
    """
    unknown = {name: value for name, value in kwargs.items() if name not in KEYWORDS}
    if unknown:
        raise TypeError(unknown_keywords("quantize", unknown, KEYWORDS))
    transformers = sys.modules.get("transformers")
    adopted = transformers is not None and isinstance(model, transformers.PreTrainedModel)
    held: Any = getattr(model, "hf_quantizer", None)
    from_gguf = adopted and is_float_gguf(model)
    if adopted and held is not None and not from_gguf:
        refuse_gguf_blocks(model)
        method = held.quantization_config.quant_method
        raise ValueError(f"{type(model).__name__} is quantized already, with {method}; quantize the float model")
    # before anything is changed: it refuses more than flow does
    config = _config(weights, activations, kwargs) if adopted else None
    flow.quantize(model, weights, activations, **kwargs)
    watch_saving()
    watch_other_savers()
    if from_gguf:
        forget_gguf(model)
    if config is not None:
        _adopt(model, config)
    return model


def _config(weights: Any, activations: Any, kwargs: dict[str, Any]) -> QuantoConfig:
    """The config that says the same, with names for number types and fits."""
    overrides = {
        pattern: {key: _name(value) for key, value in values.items()} if isinstance(values, Mapping) else values
        for pattern, values in (kwargs.get("overrides") or {}).items()
    }
    return QuantoConfig(
        weights=_name(weights),
        activations=_name(activations),
        modules_to_not_convert=flow.as_patterns(_either(kwargs, "modules_to_not_convert", "exclude")),
        group_size=kwargs.get("group_size"),
        symmetric=kwargs.get("symmetric"),
        fit=_name(_either(kwargs, "fit", "optimizer")),
        overrides=overrides,
        embeddings=_name(kwargs.get("embeddings")),
    )


def _either(kwargs: dict[str, Any], name: str, older: str) -> Any:
    return flow.either(name, kwargs.get(name), older, kwargs.get(older))


def _name(value: Any) -> Any:
    if isinstance(value, Fit):
        # one with other arguments, or of the user's own, cannot be found again
        return name_of_fit(value)
    return value.name if isinstance(value, QType) else value


def _adopt(model: Any, config: QuantoConfig) -> None:
    from quanto_hf.hf.load.quantizer import QuantoHfQuantizer
    from quanto_hf.hf.load.watching import watch_models

    quantizer = QuantoHfQuantizer(config, pre_quantized=False)
    quantizer.describe(model)
    quantizer.belongs_to(model)
    model.hf_quantizer = quantizer
    watch_models()
    model.config.quantization_config = quantizer.quantization_config
    model.is_quantized, model.quantization_method = True, quantizer.quantization_config.quant_method
