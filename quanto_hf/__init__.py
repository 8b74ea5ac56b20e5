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

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from quanto_hf import hf as _hf
from quanto_hf.flow import Calibration, calibrate, compare, dequantize, freeze, report, smooth
from quanto_hf.hf import AqlmConfig, QuantoConfig, install, quantize
from quanto_hf.io import CheckpointError
from quanto_hf.nn import QConv2d, QEmbedding, QLinear
from quanto_hf.qtypes import qtype

try:
    __version__ = version("quanto-hf")
except PackageNotFoundError:
    # run from a checkout that is not installed
    __version__ = "0.0.0"

__all__ = [
    "AqlmConfig",
    "Calibration",
    "CheckpointError",
    "QConv2d",
    "QEmbedding",
    "QLinear",
    "QuantoConfig",
    "calibrate",
    "compare",
    "convert_checkpoint",
    "dequantize",
    "freeze",
    "install",
    "plan",
    "qtype",
    "quantize",
    "report",
    "smooth",
]

_hf.register()

# Names that live elsewhere: what takes a second to import, and what was here before it had a module of its own.
_ELSEWHERE = {
    "quanto_hf.hf": (
        "QuantoHfQuantizer", "convert_checkpoint", "plan", "replace_with_aqlm_linear", "replace_with_quanto_layers",
    ),
    "quanto_hf.aqlm": ("collect_moments", "freeze_aqlm", "tune_blocks", "tune_codebooks", "tune_end_to_end"),
    "quanto_hf.compat": (
        "AbsmaxOptimizer", "HqqOptimizer", "MaxOptimizer", "QType", "load_and_quantize_model", "qfloat8",
        "qfloat8_e4m3fn", "qfloat8_e5m2", "qfp4", "qint2", "qint4", "qint8", "qnf4", "quantization_map",
        "requantize",
    ),
    "quanto_hf.assets": ("heldout_text", "tiny_lm"),
}  # fmt: skip
_HOME = {name: module for module, names in _ELSEWHERE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
