"""Every kind of adapter that the installed ``peft`` has, on quantized models: forward, gradients, reload.

The twin of a quantized model has the same numbers in plain float layers. What an adapter computes on both, and the
gradients that its parameters get, must be the same but for the order of sums.
"""

import dataclasses
import functools
import inspect

import pytest
import torch
import transformers as tf
from tiny_models import build, relative, tokens

from quanto_hf import QLinear, QuantoConfig

peft = pytest.importorskip("peft")
mapping = pytest.importorskip("peft.mapping")

KINDS = mapping.PEFT_TYPE_TO_CONFIG_MAPPING
MIXED = mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING
# Sizes that fit a model of width 64, where the defaults of a method do not; "target_modules" None: it finds its own
VALUES = {
    "ADALORA": {"total_step": 10},
    "ADAMSS": {"num_subspaces": 2, "subspace_rank": 2},
    "ADAPTION_PROMPT": {"target_modules": None, "adapter_len": 4, "adapter_layers": 2},
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 50},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "OFT": {"oft_block_size": 8, "r": 0},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [3, 4]},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 50},
}
PROMPTS = {"num_virtual_tokens": 4}


def config(kind: str):
    """A config of this kind for a tiny Llama."""
    cls = KINDS[kind]
    known = {field.name for field in dataclasses.fields(cls)}
    values = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "r": 4, **PROMPTS}
    values = {name: value for name, value in values.items() if name in known}
    if "target_modules" not in known or "num_virtual_tokens" in known:
        values.pop("target_modules", None)
    given = {**values, **VALUES.get(kind, {})}
    return cls(**{name: value for name, value in given.items() if value is not None})
