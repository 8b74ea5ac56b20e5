"""Models that transformers has read from a GGUF file: their weights are float, and their config says something else."""

from typing import Any

GGUF_METHOD = "gguf"


def is_float_gguf(model: Any) -> bool:
    """Whether a model came from a GGUF file with its weights made float, so that only its marks are those of a
    quantized one. (With a kernel for it transformers keeps the blocks of the file in layers of its own.)"""
    quantizer = getattr(model, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    return getattr(method, "value", method) == GGUF_METHOD and not getattr(quantizer, "packed_modules", None)


def forget_gguf(model: Any) -> None:
    """Take the marks of a GGUF file off a model whose weights are float: from here on it is a float model, which can be
    saved, trained and quantized."""
    model.hf_quantizer.remove_quantization_config(model)
    if getattr(model.config, "_is_quantized", False):
        model.config._is_quantized = False
