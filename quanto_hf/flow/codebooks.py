"""Codebooks that cost more than they are worth: they have the same size in a small layer as in a large one."""

import warnings
from typing import Any

import torch
from torch import nn

from quanto_hf.flow.plan import Plan
from quanto_hf.nn import QuantizedWeight
from quanto_hf.nn.registry import slots_of
from quanto_hf.nn.slots import find
from quanto_hf.schemes import Aqlm

# Bits per weight. The published 1x16 has 0.5 at 4096 x 4096, and 8 at 1024 x 1024.
COSTLY = 0.5


def costly_codebooks(layers: dict[str, tuple[Aqlm, tuple[int, int], torch.dtype]]) -> str | None:
    """A sentence about the layers whose codebooks take more than half a bit per weight, or None.

    Args:
        layers: name -> scheme, shape and float dtype.

    Example:
        >>> print(costly_codebooks({"fc": (Aqlm(1, 16), (1024, 1024), torch.float16)}))
        the codebooks of 1 AQLM layer take more than 0.5 bits per weight, at most 8.0 (fc: 10.02 bits in all); ...
    """
    costs = {name: scheme.codebook_bits(shape, dtype) for name, (scheme, shape, dtype) in layers.items()}
    costly = [name for name, bits in costs.items() if bits > COSTLY]
    if not costly:
        return None
    worst = max(costly, key=costs.__getitem__)
    scheme, shape, dtype = layers[worst]
    return (
        f"the codebooks of {len(costly)} AQLM layer{'s' * (len(costly) > 1)} take more than {COSTLY} bits per weight, "
        f"at most {costs[worst]:.1f} ({worst}: {scheme.bits(shape, dtype):.2f} bits in all); fewer bits per code make "
        f"smaller codebooks, and small layers may stay float"
    )


def warn_of_codebooks(model: nn.Module, plan: Plan) -> None:
    """Warn if the codebooks of a plan cost more than half a bit per weight."""
    layers: dict[str, tuple[Aqlm, tuple[int, int], torch.dtype]] = {}
    for name, choice in plan.chosen.items():
        scheme, (owner, leaf) = choice.scheme(), find(model, name)
        if isinstance(scheme, Aqlm):
            module = model.get_submodule(owner)
            rows, columns = slots_of(module)[leaf].matrix_shape
            layers[name] = (scheme, (rows, columns), getattr(module, leaf).dtype)
    if (sentence := costly_codebooks(layers)) is not None:
        warnings.warn(sentence, stacklevel=3)


def codebooks_of(model: nn.Module) -> str | None:
    """The same sentence about the layers of a quantized model."""
    layers: dict[str, Any] = {
        slot.label(name): (scheme, slot.matrix_shape, stored["codebooks"].dtype)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedWeight)
        for slot in module.slots
        if isinstance(scheme := module.scheme_of(slot), Aqlm) and (stored := module.tensors(slot.name))
    }
    return costly_codebooks(layers)
