"""What the schemes of a model have to say about its layers, before they are made and afterwards."""

import warnings

from torch import nn

from quanto_hf.flow.plan import Plan
from quanto_hf.nn import QuantizedWeight
from quanto_hf.nn.registry import slots_of
from quanto_hf.nn.slots import find
from quanto_hf.schemes import TensorSpec, notes


def notes_of(model: nn.Module) -> tuple[str, ...]:
    """Sentences about the layers of a quantized model whose weights are stored."""
    found = {}
    for name, module in model.named_modules():
        for slot in module.slots if isinstance(module, QuantizedWeight) else ():
            if held := module.tensors(slot.name):
                specs = {part: TensorSpec(tuple(tensor.shape), tensor.dtype) for part, tensor in held.items()}
                found[slot.label(name)] = module.scheme_of(slot), specs
    return notes(found)


def warn_of_notes(model: nn.Module, plan: Plan) -> None:
    """Warn of what schemes have to say about the layers of a plan."""
    layers = {}
    for name, choice in plan.chosen.items():
        scheme, (owner, leaf) = choice.scheme(), find(model, name)
        module = model.get_submodule(owner)
        layers[name] = scheme, scheme.tensors(slots_of(module)[leaf].matrix_shape, getattr(module, leaf).dtype)
    for note in notes(layers):
        warnings.warn(note, stacklevel=3)
