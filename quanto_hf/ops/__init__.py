"""How fast: the ops, each with its schema, check, reference (the definition), fake and backward, and their kernels.

Imports: ``qtypes`` and torch. Never: a scheme, a module, transformers.
"""

from quanto_hf.ops.activation import ACTIVATION_GROUP, TOKEN, activation_group, round_activations
from quanto_hf.ops.cpu import aqlm, experts, kernels  # noqa: F401
from quanto_hf.ops.cpu import embedding as _native_embedding  # noqa: F401  the native ones are asked first
from quanto_hf.ops.cpu.aqlm_bound import bind_aqlm
from quanto_hf.ops.cpu.bound import BoundLinear
from quanto_hf.ops.cpu.bound import bind as bind_linear
from quanto_hf.ops.cpu.embedding_bound import BoundEmbedding, bind_embedding
from quanto_hf.ops.cpu.experts_bound import BoundExperts, bind_experts

from quanto_hf.ops import torch_aqlm, torch_experts, torch_kernels  # noqa: F401  isort: skip
from quanto_hf.ops.aqlm import (
    MAX_BITS,
    aqlm_dequantize,
    aqlm_dequantize_op,
    aqlm_linear,
    aqlm_linear_grad_input,
    aqlm_linear_op,
    code_dtype,
)
from quanto_hf.ops.dequantize import dequantize, groups
from quanto_hf.ops.embedding import embedding, embedding_op
from quanto_hf.ops.expert_linear import expert_linear, expert_linear_grad_input, expert_linear_op
from quanto_hf.ops.index import check_index
from quanto_hf.ops.linear import linear, linear_grad_input, linear_op
from quanto_hf.ops.packing import pack, packed_width, row_lengths, unpack
from quanto_hf.ops.registry import OPS
from quanto_hf.ops.straight_through import scale_gradient

__all__ = [
    "ACTIVATION_GROUP",
    "MAX_BITS",
    "OPS",
    "TOKEN",
    "BoundEmbedding",
    "BoundExperts",
    "BoundLinear",
    "activation_group",
    "aqlm_dequantize",
    "aqlm_dequantize_op",
    "aqlm_linear",
    "aqlm_linear_grad_input",
    "aqlm_linear_op",
    "bind_aqlm",
    "bind_embedding",
    "bind_experts",
    "bind_linear",
    "check_index",
    "code_dtype",
    "dequantize",
    "embedding",
    "embedding_op",
    "expert_linear",
    "expert_linear_grad_input",
    "expert_linear_op",
    "groups",
    "linear",
    "linear_grad_input",
    "linear_op",
    "pack",
    "packed_width",
    "round_activations",
    "row_lengths",
    "scale_gradient",
    "unpack",
]
