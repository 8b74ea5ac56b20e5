"""The weights of a model that could be packed and are not to be."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from quanto_hf.flow.report import kind_of, why_float
from quanto_hf.nn import QuantizedWeight, why_no_qmodule
from quanto_hf.nn.packed import is_matrix
from quanto_hf.nn.registry import LOAD, entry_of
from quanto_hf.nn.slots import joined, label


@dataclass(frozen=True)
class FloatWeight:
    """A matrix that stays float.

    Args:
        name: full name of the parameter.
        label: what patterns call it (:func:`quanto_hf.nn.slots.label`).
        kind: the type of its module.
        shape: of the parameter.
        nbytes: of the parameter.
        reason: why it stays float.
        named: whether it is packed where a pattern names it, and not by default.
    """

    name: str
    label: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    reason: str
    named: bool

    @property
    def numel(self) -> int:
        """Number of its weights."""
        return torch.Size(self.shape).numel()


def float_weights(model: nn.Module, left: Mapping[str, str], chosen: Mapping[str, object]) -> list[FloatWeight]:
    """The matrices of a model that stay float, each parameter once.

    Args:
        model: float or quantized, also on meta.
        left: name of a slot -> why it stays float, of slots that do not know it themselves yet.
        chosen: names of the slots that are to be packed.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(8, 8, 1))
        >>> [(weight.kind, weight.named) for weight in float_weights(model, {}, {"0": None})]
        [('Conv2d', True)]
    """
    found: list[FloatWeight] = []
    seen: set[int] = set()
    for owner, module in model.named_modules():
        packed = isinstance(module, QuantizedWeight)
        entry = entry_of(module)
        for leaf, parameter in module.named_parameters(recurse=False):
            name, called = joined(owner, leaf), label(owner, leaf)
            if id(parameter) in seen or called in chosen or not is_matrix(name, parameter.shape):
                continue
            seen.add(id(parameter))
            if packed and leaf in (*module.stored_names, *module.slot_names):
                continue
            cls = entry.quantized if entry is not None and leaf in entry.quantized.slot_names else None
            named = cls is not None and LOAD not in cls.by_default and why_no_qmodule(module) is None
            reason, shape = left.get(called) or why_float(module, leaf), tuple(parameter.shape)
            found.append(FloatWeight(name, called, kind_of(module), shape, parameter.nbytes, reason, named))
    return found
