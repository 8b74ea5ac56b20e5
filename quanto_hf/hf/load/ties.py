"""What transformers is told about weights that several modules share: names of what the modules hold, packed or float.

transformers ties by names, ``lm_head.weight`` to ``model.embed_tokens.weight``. A packed pair has ``weight_packed`` and
``weight_scale`` in the place of these, and float weights again once it is dequantized. The mapping that a model keeps
stays that of the float model; what is read of it is made for what the modules hold at the time. Loading, device maps,
sizes, tying, saving and offload all ask transformers, and need no rule of their own.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import transformers
from torch import nn

from quanto_hf.nn import QuantizedWeight
from quanto_hf.nn.slots import Slot, joined

KEYS, DECLARED = "all_tied_weights_keys", "_tied_weights_keys"


class TiedKeys(dict[str, str]):
    """The mapping of a model with packed ties: name of a tensor -> the one that it is tied to.

    Args:
        made: the mapping.
        floats: that of the float model, which the model keeps. What is not tied after all is taken from it as well.
        origin: name in ``made`` -> name in ``floats``.
    """

    def __init__(self, made: Mapping[str, str], floats: dict[str, str], origin: Mapping[str, str]) -> None:
        super().__init__(made)
        # of each model its own: copies of the dict are plain ones
        self.floats, self.origin = floats, origin

    def pop(self, key: str, *default: Any) -> Any:
        """As of a dict."""
        self.floats.pop(self.origin.get(key, key), None)
        return super().pop(key, *default)

    def __reduce__(self) -> Any:
        return TiedKeys, (dict(self), dict(self.floats), dict(self.origin))


def float_ties(model: Any) -> dict[str, str]:
    """Full name of a float parameter -> the one that it is tied to, whatever the modules hold now."""
    found: dict[str, str] = vars(model).get(KEYS) or {}
    return found


def held_ties(model: nn.Module, floats: dict[str, str]) -> dict[str, str]:
    """The same by the names of what the modules hold: the mapping itself where nothing is packed."""
    made: dict[str, str] = {}
    origin: dict[str, str] = {}
    for target, source in floats.items():
        for one, other in _held(model, target, source):
            made[one], origin[one] = other, target
    return floats if made == floats else TiedKeys(made, floats, origin)


def _held(model: nn.Module, target: str, source: str) -> Iterator[tuple[str, str]]:
    ours, theirs = _slot(model, target), _slot(model, source)
    floats = all(found is None or found[0]._parameters.get(found[1].name) is not None for found in (ours, theirs))
    if floats:
        yield target, source
    if ours is None or theirs is None:
        return
    (layer, slot), (other, its) = ours, theirs
    scheme = layer.scheme_of(slot)
    if scheme != other.scheme_of(its) or not layer.tensors(slot.name) or not other.tensors(its.name):
        return
    before, behind = target.rpartition(".")[0], source.rpartition(".")[0]
    for part in scheme.names:
        yield joined(before, slot.stored(part)), joined(behind, its.stored(part))


def _slot(model: nn.Module, name: str) -> tuple[QuantizedWeight, Slot] | None:
    """The quantized module and the slot whose float parameter has this name."""
    owner, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return None
    if not isinstance(module, QuantizedWeight):
        return None
    return next(((module, slot) for slot in module.slots if slot.name == leaf), None)


def tied_with(model: nn.Module, name: str) -> list[str]:
    """The other float names that are one weight with this one. transformers ties all of them to one source."""
    floats = float_ties(model)
    if name not in floats and name not in floats.values():
        return []
    source = floats.get(name, name)
    return [other for other in (source, *(t for t, s in floats.items() if s == source)) if other != name]


def arrives(model: nn.Module, name: str) -> list[str]:
    """A float weight arrives and is packed: the other slots that share it have none to wait for. (One that comes all
    the same is packed too, and compared by transformers.)

    Args:
        model: the one that is loaded.
        name: of the float parameter.

    Returns:
        The names of the placeholders that are gone.
    """
    gone = []
    for other in tied_with(model, name):
        found = _slot(model, other)
        if found is not None and found[0].tensors(found[1].name):
            found[0]._parameters.pop(found[1].name, None)
            gone.append(other)
    return gone


def untie_parts(model: nn.Module) -> None:
    """Two weights of which transformers has found that they differ, although one of their stored tensors is the same (a
    weight and twice the weight have equal codes): they share nothing."""
    held: dict[int, tuple[int, ...]] = {}
    layers = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    for module in layers:
        for slot in module.slots:
            tensors = {name: module._parameters.get(name) for name in slot.names(module.scheme_of(slot))}
            mine = tuple(id(tensor) for tensor in tensors.values() if tensor is not None)
            for name, tensor in tensors.items():
                if tensor is not None and held.setdefault(id(tensor), mine) != mine and not tensor.is_meta:
                    module._parameters[name] = module.as_stored(name, tensor.data.clone(), slot)


def note_ties(model: Any) -> None:
    """Let ``_tied_weights_keys`` of a model, which PEFT reads, name what its modules hold besides the float names that
    its class declares; nothing besides where no tie is packed."""
    if isinstance(vars(model).get(DECLARED), TiedKeys):
        delattr(model, DECLARED)
    declared = getattr(model, DECLARED, None)
    if not isinstance(declared, dict) or DECLARED in vars(model) or KEYS not in vars(model):
        return
    held = held_ties(model, vars(model)[KEYS])
    if isinstance(held, TiedKeys):
        setattr(model, DECLARED, TiedKeys({**declared, **held}, {}, held.origin))


def know_ties() -> None:
    """Let models of transformers answer with the names of what their modules hold. In the class, as their parts are
    asked too; nothing changes for models without packed ties."""
    base: Any = transformers.PreTrainedModel
    expand = base.get_expanded_tied_weights_keys
    if getattr(expand, "knows_quanto_hf", False):
        return

    @functools.wraps(expand)
    def get_expanded_tied_weights_keys(self: Any, *args: Any, **kwargs: Any) -> dict[str, str]:
        note_ties(self)
        own = getattr(vars(self).get(DECLARED), "origin", ())
        floats = {name: other for name, other in expand(self, *args, **kwargs).items() if name not in own}
        return dict(held_ties(self, floats))

    def read(self: Any) -> dict[str, str]:
        if KEYS not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {KEYS!r}")
        return held_ties(self, vars(self)[KEYS])

    def write(self: Any, value: dict[str, str]) -> None:
        vars(self)[KEYS] = value

    def delete(self: Any) -> None:
        vars(self).pop(KEYS, None)

    get_expanded_tied_weights_keys.knows_quanto_hf = True  # type: ignore[attr-defined]
    base.get_expanded_tied_weights_keys = get_expanded_tied_weights_keys
    setattr(base, KEYS, property(read, write, delete, "Name of a tensor -> the name of the one that it is tied to."))
