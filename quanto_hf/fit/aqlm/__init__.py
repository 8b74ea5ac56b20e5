"""Weights as sums of vectors from codebooks (AQLM): codes, codebooks and scales, with no data or for given inputs.

Imports: ``qtypes``, ``ops`` and torch. Never: a scheme, a module, a model.
"""

from quanto_hf.fit.aqlm.layout import Layout, decode, read_codes, stored_codes
from quanto_hf.fit.aqlm.quantize import AqlmTensors, quantize_aqlm

__all__ = ["AqlmTensors", "Layout", "decode", "quantize_aqlm", "read_codes", "stored_codes"]
