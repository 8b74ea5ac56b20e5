"""Additive codebooks (AQLM): the config of published checkpoints, making weights for given inputs, and tuning them.

Imports: every room. See docs/aqlm.md.

Example:
    >>> import quanto_hf.aqlm
    >>> quanto_hf.aqlm.AqlmConfig(num_codebooks=2, nbits_per_codebook=8).weights
    'aqlm-2x8'
"""

from quanto_hf.flow import collect_moments, freeze_aqlm, tune_blocks, tune_codebooks, tune_end_to_end
from quanto_hf.hf import AqlmConfig
from quanto_hf.nn import QuantizedLinear
from quanto_hf.schemes import Aqlm

__all__ = [
    "Aqlm",
    "AqlmConfig",
    "QuantizedLinear",
    "collect_moments",
    "freeze_aqlm",
    "tune_blocks",
    "tune_codebooks",
    "tune_end_to_end",
]
