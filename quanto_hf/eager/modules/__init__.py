"""Modules with a scale that was found beforehand: for their output, their weights, or both.

Activations travel as float tensors whose values lie on a grid of integers. ``from_float`` makes a module from an
observed one: one with a ``qconfig``, and for a static output an ``activation_post_process``. Nothing is held in a
quantized dtype.

Imports: ``schemes``, ``nn``. Never: a whole model.
"""

from quanto_hf.eager.modules.activation import (
    ELU,
    Dropout,
    Hardsigmoid,
    Hardswish,
    LeakyReLU,
    PReLU,
    ReLU6,
    Sigmoid,
    Softmax,
    Tanh,
)
from quanto_hf.eager.modules.conv import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvReLU1d,
    ConvReLU2d,
    ConvReLU3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
)
from quanto_hf.eager.modules.embedding import Embedding, EmbeddingBag
from quanto_hf.eager.modules.errors import QConfigError
from quanto_hf.eager.modules.functional import FloatFunctional, QFunctional
from quanto_hf.eager.modules.linear import DynamicLinear, DynamicLinearReLU, Linear, LinearReLU
from quanto_hf.eager.modules.norm import (
    BatchNorm2d,
    BatchNorm3d,
    BNReLU2d,
    BNReLU3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
)
from quanto_hf.eager.modules.on_grid import OnGrid
from quanto_hf.eager.modules.quantize import DeQuantize, Quantize
from quanto_hf.eager.modules.recurrent import GRU, LSTM, GRUCell, LSTMCell, RNNCell, StoredRecurrent
from quanto_hf.eager.modules.stored_weights import StoredWeights, as_reference

__all__ = [
    "ELU",
    "GRU",
    "LSTM",
    "BNReLU2d",
    "BNReLU3d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvReLU1d",
    "ConvReLU2d",
    "ConvReLU3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "DeQuantize",
    "Dropout",
    "DynamicLinear",
    "DynamicLinearReLU",
    "Embedding",
    "EmbeddingBag",
    "FloatFunctional",
    "GRUCell",
    "GroupNorm",
    "Hardsigmoid",
    "Hardswish",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LSTMCell",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "LinearReLU",
    "OnGrid",
    "PReLU",
    "QConfigError",
    "QFunctional",
    "Quantize",
    "RNNCell",
    "ReLU6",
    "Sigmoid",
    "Softmax",
    "StoredRecurrent",
    "StoredWeights",
    "Tanh",
    "as_reference",
]
