"""Names that users of optimum-quanto, and of its integration into transformers, know.

Imports: every room. See docs/from-optimum-quanto.md.

Example:
    >>> from quanto_hf.compat import HqqOptimizer, qint4
    >>> qint4.bits, HqqOptimizer().name
    (4, 'hqq')
"""

from quanto_hf.fit import AbsmaxOptimizer, HqqOptimizer, MaxOptimizer
from quanto_hf.flow import Calibration, dequantize, freeze, quantization_map, requantize
from quanto_hf.hf import load_and_quantize_model, quantize
from quanto_hf.nn import QConv2d, QEmbedding, QLinear
from quanto_hf.qtypes import QType, qfloat8, qfloat8_e4m3fn, qfloat8_e5m2, qfp4, qint2, qint4, qint8, qnf4, qtype

__all__ = [
    "AbsmaxOptimizer",
    "Calibration",
    "HqqOptimizer",
    "MaxOptimizer",
    "QConv2d",
    "QEmbedding",
    "QLinear",
    "QType",
    "dequantize",
    "freeze",
    "load_and_quantize_model",
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
    "requantize",
]
