"""Ties: several slots with one weight, which stay one weight when it is packed, and when it is made float again.

An embedding and the output head mostly share theirs; encoder-decoder models share one among up to four modules.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from quanto_hf.flow.holders import held_parameters
from quanto_hf.flow.patterns import any_names
from quanto_hf.nn import QuantizedWeight
from quanto_hf.nn.registry import slots_of
from quanto_hf.nn.slots import Slot, joined, label

# module name, module and slot
Entry = tuple[str, QuantizedWeight, Slot]
Group = list[Entry]


class Ties:
    """Which slots of a model share a weight.

    Args:
        model: float or quantized; may be on meta.
        declared: full name of a parameter -> the full name of the one that it will be tied to. A model that is being
            loaded is not tied yet.
    """

    def __init__(self, model: nn.Module, declared: Mapping[str, str] | None = None) -> None:
        # full name of a parameter -> the names that are one weight; one list for all of them
        self._groups: dict[str, list[str]] = {}
        # the names by which modules come up, in the place of others that a module has too
        self._names = {id(module): name for name, module in reversed(list(model.named_modules()))}
        first: dict[int, str] = {}
        for owner, module in model.named_modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    self._join(first.setdefault(id(parameter), joined(owner, leaf)), joined(owner, leaf))
        for target, source in (declared or {}).items():
            self._join(self._known(model, source), self._known(model, target))
        # what holds a parameter besides the registers of modules: nobody can give it a packed one
        self.elsewhere = {first[number]: place for number, place in held_parameters(model).items() if number in first}

    def _known(self, model: nn.Module, name: str) -> str:
        owner, _, leaf = name.rpartition(".")
        try:
            return joined(self._names[id(model.get_submodule(owner))], leaf)
        except AttributeError:
            return name

    def _join(self, one: str, other: str) -> None:
        mine, theirs = self._groups.get(one, [one]), self._groups.get(other, [other])
        merged = mine if mine is theirs else list(dict.fromkeys([*mine, *theirs]))
        for name in merged:
            self._groups[name] = merged

    def others(self, name: str) -> list[str]:
        """The full names that are one weight with this one."""
        return [other for other in self._groups.get(name, ()) if other != name]

    def group(self, name: str) -> list[str]:
        """These and the name itself, in the order of the model."""
        return self._groups.get(name, [name])

    def packed(self, model: nn.Module) -> "list[Group]":
        """The groups whose slots are all packed now, with one scheme: those of a model that was quantized since."""
        found: list[Group] = []
        for names in {id(group): group for group in self._groups.values() if len(group) > 1}.values():
            slots = [_packed(model, name) for name in names]
            group = [entry for entry in slots if entry is not None]
            if len(group) == len(names) and len({module.scheme_of(slot) for _, module, slot in group}) == 1:
                found.append(group)
        return found

    def asked(self, patterns: Iterable[str]) -> list[str]:
        """The patterns, and the names of all that shares a weight with what one of them names itself."""
        patterns = list(patterns)
        groups = {id(group): group for group in self._groups.values() if len(group) > 1}.values()
        labels = [[as_label(name) for name in group] for group in groups]
        return [*patterns, *(name for group in labels if any_names(group, patterns) for name in group)]

    def held_by(self, name: str) -> str | None:
        """Where something else holds this weight than the registers of modules, or None."""
        return next((self.elsewhere[n] for n in self.group(name) if n in self.elsewhere), None)


def _packed(model: nn.Module, name: str) -> "Entry | None":
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if not isinstance(module, QuantizedWeight) or module._parameters.get(leaf) is not None:
        return None
    return next(((owner, module, slot) for slot in module.slots if slot.name == leaf), None)


def as_label(name: str) -> str:
    """What patterns call the slot whose parameter has this full name."""
    owner, _, leaf = name.rpartition(".")
    return label(owner, leaf)


def why_not_one(model: nn.Module, names: Iterable[str]) -> str | None:
    """Why slots cannot share one packed weight, or None: each has to see it as the same matrix.

    Args:
        names: full names of parameters.
    """
    shapes = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        slot = slots_of(model.get_submodule(owner)).get(leaf)
        if slot is None:
            return f"{name} is no parameter that is quantized"
        shapes[name] = slot.matrix_shape
    if len(set(shapes.values())) == 1:
        return None
    return "they are matrices of other shapes: " + ", ".join(f"{n} {shape}" for n, shape in shapes.items())


# ------------------------------------------------------------------------------------------- packed, and float again


def float_slots(model: nn.Module) -> Group:
    """Module name, module and slot of all slots of quantized modules that hold a float parameter."""
    return [
        (name, module, slot)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedWeight)
        for slot in module.slots
        if module._parameters.get(slot.name) is not None
    ]


def tied_slots(model: nn.Module) -> list[Group]:
    """The float slots that share a parameter and can share a packed one: each a list, in the order of the model."""
    found: dict[Any, Group] = {}
    for entry in float_slots(model):
        _, module, slot = entry
        key = id(module._parameters[slot.name]), module.scheme_of(slot), slot.matrix_shape
        found.setdefault(key, []).append(entry)
    return [entries for entries in found.values() if len(entries) > 1]


def share_packed(groups: Iterable[Group]) -> None:
    """Let all slots of a group hold the stored tensors of the first one, which is packed."""
    for (_, first, slot), *others in groups:
        for _, module, other in others:
            hold_same(module, other, first, slot)


def pack(model: nn.Module) -> None:
    """Pack all slots that hold a float parameter; those that share one share the packed one.

    Raises:
        ValueError: a weight has NaN or infinite values; the text names the layer.
    """
    tied = tied_slots(model)
    later = {(id(module), slot.name) for _, *others in tied for _, module, slot in others}
    for name, module, slot in float_slots(model):
        if (id(module), slot.name) in later:
            continue
        try:
            module.freeze_slot(slot)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    share_packed(tied)


def hold_same(layer: QuantizedWeight, slot: Slot, first: QuantizedWeight, other: Slot) -> None:
    """Let a slot hold the stored tensors of another packed one: the same Parameter objects."""
    layer._parameters.pop(slot.name, None)
    layer.weight_dtype = first.weight_dtype
    layer.slot_errors[slot.name] = first.slot_errors.get(other.name)
    layer.set_tensors(dict(first.tensors(other.name)), slot.name)


def to_float(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Quantized module -> float one, of all that a model has; what was one weight is one Parameter.

    Args:
        model: it is not changed.
    """
    known: dict[tuple[int, ...], nn.Parameter] = {}
    return {module: module.to_float(known) for module in model.modules() if isinstance(module, QuantizedWeight)}
