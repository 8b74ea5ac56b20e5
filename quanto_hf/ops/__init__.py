"""How fast: the ops, each with its schema, check, reference (the definition), fake and backward, and their kernels.

A quantized weight goes through them as a value (``weight.py``); kernels are in a folder for each device. Imports:
``qtypes`` and torch. Never: a scheme, a module, transformers. Nobody above imports a device: what is offered is here.
"""

from quanto_hf.ops.activation import ACTIVATION_GROUP, TOKEN, activation_group, round_activations, scale_gradient
from quanto_hf.ops.cpu import kernels  # noqa: F401  the native ones are asked first

from quanto_hf.ops.torch import blocks, experts, rows  # noqa: F401  isort: skip
from quanto_hf.ops.aqlm_weight import MAX_BITS, code_dtype
from quanto_hf.ops.dequantize import dequantize, dequantize_op
from quanto_hf.ops.embedding import embedding, embedding_op
from quanto_hf.ops.expert_linear import expert_linear, expert_linear_grad_input, expert_linear_op
from quanto_hf.ops.grouped_weight import groups
from quanto_hf.ops.index import check_index
from quanto_hf.ops.kernel import DEVICES
from quanto_hf.ops.linear import linear, linear_grad_input, linear_op
from quanto_hf.ops.linear_rounded import linear_rounded, linear_rounded_op
from quanto_hf.ops.packing import pack, packed_width, row_lengths, unpack
from quanto_hf.ops.quantize import quantize_op
from quanto_hf.ops.registry import OPS
from quanto_hf.ops.weight import AqlmWeight, GroupedWeight, Weight

__all__ = [
    "ACTIVATION_GROUP",
    "DEVICES",
    "MAX_BITS",
    "OPS",
    "TOKEN",
    "AqlmWeight",
    "GroupedWeight",
    "Weight",
    "activation_group",
    "check_index",
    "code_dtype",
    "dequantize",
    "dequantize_op",
    "embedding",
    "embedding_op",
    "expert_linear",
    "expert_linear_grad_input",
    "expert_linear_op",
    "groups",
    "linear",
    "linear_grad_input",
    "linear_op",
    "linear_rounded",
    "linear_rounded_op",
    "pack",
    "packed_width",
    "quantize_op",
    "round_activations",
    "row_lengths",
    "scale_gradient",
    "unpack",
]
