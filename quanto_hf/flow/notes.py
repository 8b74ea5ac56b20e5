"""What the schemes of a model have to say about its layers, before they are made and afterwards."""

import warnings

import torch
from torch import nn

from quanto_hf.flow.plan import Plan
from quanto_hf.nn import QuantizedWeight
from quanto_hf.schemes import TensorSpec, notes


def notes_of(model: nn.Module) -> tuple[str, ...]:
    """Sentences about the layers of a quantized model whose weights are stored."""
    return notes(
        {
            name: (module.scheme, {part: TensorSpec(tuple(t.shape), t.dtype) for part, t in module.tensors().items()})
            for name, module in model.named_modules()
            if isinstance(module, QuantizedWeight) and module.tensors()
        }
    )


def warn_of_notes(model: nn.Module, plan: Plan) -> None:
    """Warn of what schemes have to say about the layers of a plan."""
    layers = {}
    for name, choice in plan.chosen.items():
        scheme, weight = choice.scheme(), model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        layers[name] = scheme, scheme.tensors((weight.shape[0], weight[0].numel()), weight.dtype)
    for note in notes(layers):
        warnings.warn(note, stacklevel=3)
