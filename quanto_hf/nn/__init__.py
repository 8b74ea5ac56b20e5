"""Quantized modules. They know that a scheme stores and multiplies a weight, and no scheme by its name.

Imports: ``qtypes``, ``fit``, ``schemes``. Never: transformers, or a whole model.
"""

from quanto_hf.nn.qlayernorm import QLayerNorm
from quanto_hf.nn.qlinear import QLinear
from quanto_hf.nn.registry import QMODULES, qmodule_for, register_qmodule

__all__ = ["QMODULES", "QLayerNorm", "QLinear", "qmodule_for", "register_qmodule"]
