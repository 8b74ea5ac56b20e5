"""What the schemes of a model have to say about its layers, before they are made and afterwards."""

import warnings

from torch import nn

from quanto_hf.flow.assign import Assignment
from quanto_hf.nn import QuantizedWeight
from quanto_hf.nn.registry import slots_of
from quanto_hf.nn.slots import find, module_at
from quanto_hf.schemes import TensorSpec, notes


def notes_of(model: nn.Module) -> tuple[str, ...]:
    """Sentences about the layers of a quantized model whose weights are stored."""
    return notes(
        {
            slot.label(name): (module.scheme_of(slot), {part: TensorSpec(tuple(t.shape), t.dtype) for part, t in made})
            for name, module in model.named_modules()
            if isinstance(module, QuantizedWeight)
            for slot in module.slots
            if (made := module.tensors(slot.name).items())
        }
    )


def warn_of_notes(model: nn.Module, assignment: Assignment) -> None:
    """Warn of what schemes have to say about the layers of an assignment."""
    layers = {}
    for name, choice in assignment.chosen.items():
        (owner, leaf), scheme = find(model, name), choice.scheme()
        module = module_at(model, owner)
        layers[name] = scheme, scheme.tensors(slots_of(module)[leaf].matrix_shape, getattr(module, leaf).dtype)
    for note in notes(layers):
        warnings.warn(note, stacklevel=3)
