"""Codebooks that cost more than they are worth: they have the same size in a small layer as in a large one."""

import warnings
from typing import Any

import torch
from torch import nn

from quanto_hf.flow.plan import Plan
from quanto_hf.nn import QuantizedWeight
from quanto_hf.schemes import Aqlm
from quanto_hf.schemes.codebooks import costly_codebooks


def warn_of_codebooks(model: nn.Module, plan: Plan) -> None:
    """Warn if the codebooks of a plan cost more than half a bit per weight."""
    layers: dict[str, tuple[Aqlm, tuple[int, int], torch.dtype]] = {}
    for name, choice in plan.chosen.items():
        scheme, weight = choice.scheme(), model.get_submodule(name).weight
        if isinstance(scheme, Aqlm):
            assert isinstance(weight, torch.Tensor)
            layers[name] = (scheme, (weight.shape[0], weight[0].numel()), weight.dtype)
    if (sentence := costly_codebooks(layers)) is not None:
        warnings.warn(sentence, stacklevel=3)


def codebooks_of(model: nn.Module) -> str | None:
    """The same sentence about the layers of a quantized model."""
    layers: dict[str, Any] = {
        name: (module.scheme, module.matrix_shape, module.tensors()["codebooks"].dtype)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedWeight) and isinstance(module.scheme, Aqlm) and module.tensors()
    }
    return costly_codebooks(layers)
