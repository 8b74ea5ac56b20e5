"""Quantized modules. They know that a scheme stores and multiplies a weight, and no scheme by its name.

Imports: ``qtypes``, ``fit``, ``schemes``. Never: transformers, or a whole model.
"""

from quanto_hf.nn.activation import QuantizedInput
from quanto_hf.nn.aqlm import QuantizedLinear
from quanto_hf.nn.qattention import QMultiheadAttention
from quanto_hf.nn.qconv import QConv1d, QConv2d, QConv3d, QConvTranspose1d, QConvTranspose2d, QConvTranspose3d
from quanto_hf.nn.qconv1d import QConv1D
from quanto_hf.nn.qembedding import QEmbedding, QEmbeddingBag
from quanto_hf.nn.qexperts import QExperts, QTransposedExperts, QUngatedExperts
from quanto_hf.nn.qexperts_own import QLlama4Experts
from quanto_hf.nn.qlinear import QLinear
from quanto_hf.nn.qweight import QuantizedWeight, State
from quanto_hf.nn.registry import QMODULES, qmodule_for, register_qmodule, source_of, why_no_qmodule

__all__ = [
    "QMODULES",
    "QConv1D",
    "QConv1d",
    "QConv2d",
    "QConv3d",
    "QConvTranspose1d",
    "QConvTranspose2d",
    "QConvTranspose3d",
    "QEmbedding",
    "QEmbeddingBag",
    "QExperts",
    "QLinear",
    "QLlama4Experts",
    "QMultiheadAttention",
    "QTransposedExperts",
    "QUngatedExperts",
    "QuantizedInput",
    "QuantizedLinear",
    "QuantizedWeight",
    "State",
    "qmodule_for",
    "register_qmodule",
    "source_of",
    "why_no_qmodule",
]
