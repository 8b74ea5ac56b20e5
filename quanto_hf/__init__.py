"""Quantize any Hugging Face model while ``from_pretrained`` loads it, save it, reload it, run it.

Importing this module registers the method ``quanto_hf`` with transformers and does nothing else.

Example:
    >>> import quanto_hf
    >>> from transformers import AutoModelForCausalLM
    >>> model = AutoModelForCausalLM.from_pretrained(
    ...     quanto_hf.tiny_lm(), quantization_config=quanto_hf.QuantoConfig(weights="int4")
    ... )
    >>> model.model.layers[0].self_attn.q_proj
    QLinear(in_features=384, out_features=384, bias=False, weights=int4 g64 asym)
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from quanto_hf import hf as _hf
from quanto_hf.assets import heldout_text, tiny_lm
from quanto_hf.fit import AbsmaxOptimizer, HqqOptimizer, MaxOptimizer
from quanto_hf.flow import (
    Calibration,
    calibrate,
    collect_moments,
    compare,
    dequantize,
    freeze,
    freeze_aqlm,
    quantization_map,
    report,
    requantize,
    smooth,
    tune_blocks,
    tune_codebooks,
    tune_end_to_end,
)
from quanto_hf.hf import AqlmConfig, QuantoConfig, install, load_and_quantize_model, quantize
from quanto_hf.io import CheckpointError
from quanto_hf.nn import QConv2d, QEmbedding, QLinear
from quanto_hf.qtypes import QType, qfloat8, qfloat8_e4m3fn, qfloat8_e5m2, qfp4, qint2, qint4, qint8, qnf4, qtype

try:
    __version__ = version("quanto-hf")
except PackageNotFoundError:
    # run from a checkout that is not installed
    __version__ = "0.0.0"

__all__ = [
    "AbsmaxOptimizer",
    "AqlmConfig",
    "Calibration",
    "CheckpointError",
    "HqqOptimizer",
    "MaxOptimizer",
    "QConv2d",
    "QEmbedding",
    "QLinear",
    "QType",
    "QuantoConfig",
    "QuantoHfQuantizer",
    "calibrate",
    "collect_moments",
    "compare",
    "convert_checkpoint",
    "dequantize",
    "freeze",
    "freeze_aqlm",
    "heldout_text",
    "install",
    "load_and_quantize_model",
    "plan",
    "qfloat8",
    "qfloat8_e4m3fn",
    "qfloat8_e5m2",
    "qfp4",
    "qint2",
    "qint4",
    "qint8",
    "qnf4",
    "qtype",
    "quantization_map",
    "quantize",
    "replace_with_aqlm_linear",
    "replace_with_quanto_layers",
    "report",
    "requantize",
    "smooth",
    "tiny_lm",
    "tune_blocks",
    "tune_codebooks",
    "tune_end_to_end",
]

_hf.register()


_LAZY = ("QuantoHfQuantizer", "convert_checkpoint", "plan", "replace_with_aqlm_linear", "replace_with_quanto_layers")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(_hf, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
