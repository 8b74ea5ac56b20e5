"""All that holds a module or a parameter in a model: lists, hooks, closures, not only what nn.Module registers."""

import dataclasses
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import nn

# what nn.Module registers, and what holds no object of a model
REGISTERED = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})
ATOMS = (type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, torch.dtype, torch.device)
# objects of these packages are not looked into: they are many, and know nothing of the modules of a model
FOREIGN = (sys.stdlib_module_names | {"torch", "numpy"}) - {"collections", "types", "__main__"}

# objects inside of objects, from where on the walk turns back
DEPTH = 50


class Holders:
    """A walk through all that a model holds, which puts something else in the place of some objects.

    It goes through the attributes of all modules: lists, dicts, tuples, sets, partials, bound methods, weak
    references, closures of functions, and plain objects, and what these hold. Mask2Former for one keeps its layers in a
    list, and runs those.

    Args:
        swap: what is to stand in the place of a module or a tensor; the same object if nothing else.
    """

    def __init__(self, swap: Callable[[Any], Any]) -> None:
        self.swap = swap
        # where the walk is: a module and its attribute
        self.place = ""
        # also keeps objects alive whose id stands here
        self._seen: dict[int, Any] = {}
        self._depth = 0

    def walk(self, model: nn.Module) -> None:
        """Go through a model. Objects that others share are changed in place; what cannot be changed is made anew."""
        # before anything is swapped
        named = list(model.named_modules())
        for _, module in named:
            self._seen[id(module)] = module
        for name, module in named:
            self._module(module, name)

    def _module(self, module: nn.Module, name: str) -> None:
        for child_name, child in list(module._modules.items()):
            if child is not None and (new := self._value(child)) is not child:
                module._modules[child_name] = new
        for attribute, value in list(vars(module).items()):
            if attribute in REGISTERED or isinstance(value, ATOMS):
                continue
            self.place = f"{name}.{attribute}" if name else attribute
            if (new := self._value(value)) is not value:
                vars(module)[attribute] = new

    def _value(self, held: Any) -> Any:
        """What is to stand in the place of an object; its insides are changed in place if they can be."""
        if isinstance(held, ATOMS):
            return held
        if isinstance(held, nn.Module | torch.Tensor) and (new := self.swap(held)) is not held:
            return new
        if isinstance(held, torch.Tensor):
            return held
        if self._depth == DEPTH:
            return held
        self._depth += 1
        try:
            # these are made anew, each time they come up
            if isinstance(held, tuple | frozenset | types.MethodType | weakref.ref):
                return self._fixed(held)
            if id(held) not in self._seen:
                self._seen[id(held)] = held
                self._inside(held)
        finally:
            self._depth -= 1
        return held

    def _fixed(self, held: Any) -> Any:
        """The same for objects that cannot be changed."""
        if isinstance(held, types.MethodType):
            owner = self._value(held.__self__)
            if owner is held.__self__:
                return held
            # the method of this name: forward of a plain layer is not that of a quantized one
            return getattr(owner, held.__name__, None) or types.MethodType(held.__func__, owner)
        if isinstance(held, weakref.ref):
            target = held()
            # a new object nobody else holds would be gone at once
            new = self.swap(target) if isinstance(target, nn.Module) else target
            return held if new is target else type(held)(new)
        items = list(held)
        new = [self._value(item) for item in items]
        if all(a is b for a, b in zip(items, new, strict=True)):
            return held
        return held._make(new) if hasattr(held, "_make") else type(held)(new)

    def _inside(self, held: Any) -> None:
        if isinstance(held, nn.Module):
            # one that is not registered, and holds some that are
            for leaf in held._parameters.values():
                if leaf is not None:
                    self.swap(leaf)
            self._module(held, self.place)
        elif isinstance(held, list | deque):
            for at, item in enumerate(held):
                if (new := self._value(item)) is not item:
                    held[at] = new
        elif isinstance(held, MutableMapping):
            self._mapping(held)
        elif isinstance(held, set):
            for item in list(held):
                if (new := self._value(item)) is not item:
                    held.remove(item)
                    held.add(new)
        elif isinstance(held, partial):
            function, args, named = self._value(held.func), self._fixed(held.args), dict(held.keywords)
            self._mapping(named)
            if function is not held.func or args is not held.args or named != held.keywords:
                held.__setstate__((function, args, named, vars(held)))  # type: ignore[attr-defined]
        elif isinstance(held, types.FunctionType):
            self._function(held)
        elif type(held).__module__.partition(".")[0] not in FOREIGN or dataclasses.is_dataclass(held):
            self._object(held)

    def _mapping(self, held: MutableMapping[Any, Any]) -> None:
        # as it is: of a Mapping of one's own only the attributes, where reading might do anything
        if not isinstance(held, dict):
            return self._object(held)
        if any(self._key(key) is not key for key in held):
            items = [(self._key(key), value) for key, value in held.items()]
            held.clear()
            held.update(items)
        for key, value in list(held.items()):
            if (new := self._value(value)) is not value:
                held[key] = new

    def _key(self, key: Any) -> Any:
        return self.swap(key) if isinstance(key, nn.Module) else key

    def _function(self, held: types.FunctionType) -> None:
        for cell in held.__closure__ or ():
            try:
                contents = cell.cell_contents
            except ValueError:
                # a variable that has no value yet
                continue
            if (new := self._value(contents)) is not contents:
                cell.cell_contents = new
        if held.__defaults__:
            held.__defaults__ = self._fixed(held.__defaults__)
        for names in (held.__kwdefaults__, vars(held)):
            if names:
                self._mapping(names)

    def _object(self, held: Any) -> None:
        for name, value in _attributes(held):
            if (new := self._value(value)) is not value:
                # frozen dataclasses too
                object.__setattr__(held, name, new)


def _attributes(held: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of the attributes of an object itself, in its dict or in slots."""
    yield from list(getattr(held, "__dict__", {}).items())
    for cls in type(held).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(held, name):
                yield name, getattr(held, name)


def replace_everywhere(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> None:
    """Put each new module in all places of a model where its old one is, also inside of other new ones: an attention
    holds its output projection."""
    holders = Holders(lambda held: made.get(held, held) if isinstance(held, nn.Module) else held)
    holders.walk(model)
    for new in made.values():
        holders.walk(new)


def held_parameters(model: nn.Module) -> dict[int, str]:
    """``id`` of each parameter that something holds besides the registers of modules -> where."""
    found: dict[int, str] = {}

    def note(held: Any) -> Any:
        if isinstance(held, nn.Parameter):
            found.setdefault(id(held), holders.place)
        return held

    holders = Holders(note)
    holders.walk(model)
    return found
