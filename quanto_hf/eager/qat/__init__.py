"""Modules for training with quantization: float weights that are rounded in each forward pass.

``from_float`` makes one from a float module with a ``qconfig``, whose parameters it shares. What it is converted to
afterwards is in ``quanto_hf/eager/modules``.

Imports: ``nn``. Never: a whole model.
"""

from quanto_hf.eager.qat.batchnorm import (
    ConvBn1d,
    ConvBn2d,
    ConvBn3d,
    ConvBnReLU1d,
    ConvBnReLU2d,
    ConvBnReLU3d,
    LinearBn1d,
    freeze_bn_stats,
    update_bn_stats,
)
from quanto_hf.eager.qat.weighted import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvReLU1d,
    ConvReLU2d,
    ConvReLU3d,
    DynamicLinear,
    Embedding,
    EmbeddingBag,
    Linear,
    LinearReLU,
    RoundedWeight,
)

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvBn1d",
    "ConvBn2d",
    "ConvBn3d",
    "ConvBnReLU1d",
    "ConvBnReLU2d",
    "ConvBnReLU3d",
    "ConvReLU1d",
    "ConvReLU2d",
    "ConvReLU3d",
    "DynamicLinear",
    "Embedding",
    "EmbeddingBag",
    "Linear",
    "LinearBn1d",
    "LinearReLU",
    "RoundedWeight",
    "freeze_bn_stats",
    "update_bn_stats",
]
