"""From observed modules to quantized ones."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from quanto_hf.eager.custom import TO_QUANTIZED, classes
from quanto_hf.eager.fused import FusedModule
from quanto_hf.eager.hooks import compute_weights, detach, move_hooks, restore_hooks, saved_hooks
from quanto_hf.eager.mappings import (
    get_default_static_quant_module_mappings,
    get_default_static_quant_reference_module_mappings,
)
from quanto_hf.eager.modules import QConfigError
from quanto_hf.eager.qat import RoundedWeight
from quanto_hf.eager.walk import children, device_of, has_qconfig
from quanto_hf.ops.scratch import free

__all__ = ["convert", "swap_module"]

Classes = Mapping[type[nn.Module], Any]
# set on a custom module while its own class converts it, which may call convert with it
_BUSY = "_quanto_hf_converting"


def convert(
    module: nn.Module,
    mapping: Classes | None = None,
    inplace: bool = False,
    remove_qconfig: bool = True,
    is_reference: bool = False,
    convert_custom_config_dict: Mapping[str, Any] | None = None,
    use_precomputed_fake_quant: bool = False,
    *,
    allow_meta: bool = False,
) -> nn.Module:
    """Replace observed modules by quantized ones.

    Modules that are reachable by two names stay one, weights that are tied stay tied, and hooks move along.

    Args:
        module: a model that was prepared and has seen data.
        mapping: module type -> class with ``from_float``; None is the static mapping.
        inplace: change the model, and not a copy. A bare module that is replaced itself is returned.
        remove_qconfig: take qconfigs, observers and their hooks away.
        is_reference: use modules that keep their float weight and round it in each forward pass.
        convert_custom_config_dict: see :func:`get_default_custom_config_dict`, which None stands for.
        use_precomputed_fake_quant: take the scales that fake quantizations of weights hold, whatever the weights are.
        allow_meta: let tensors of a module be on meta beside those of one device.

    Returns:
        The quantized model.

    Raises:
        RuntimeError: an observer has seen nothing; the text names the module. The model is as it was then.
        QConfigError: a module cannot be quantized as its qconfig says.
    """
    if mapping is None:
        get = get_default_static_quant_reference_module_mappings if is_reference else None
        mapping = (get or get_default_static_quant_module_mappings)()
    custom = classes(convert_custom_config_dict, TO_QUANTIZED, "from_observed")
    if not inplace:
        module = copy.deepcopy(module)
    work = _Conversion(mapping, custom, use_precomputed_fake_quant, allow_meta)
    try:
        module = work.convert(module, "")
    except Exception:
        work.undo()
        raise
    finally:
        # what weights were quantized in
        free()
    work.ties.share()
    if remove_qconfig:
        for one in list(module.modules()):
            if "qconfig" in one.__dict__:
                del one.qconfig
            detach(one)
    return module


class _Ties:
    """Which new modules come from modules with the same weight: they share the stored one."""

    def __init__(self) -> None:
        # the old weights are held, so that their ids stay theirs
        self.groups: dict[int, tuple[nn.Parameter, list[tuple[str, nn.Module]]]] = {}

    def note(self, old: nn.Module, new: nn.Module) -> None:
        """A module was replaced."""
        for name, parameter in old.named_parameters(remove_duplicate=False):
            if parameter is not None:
                self.groups.setdefault(id(parameter), (parameter, []))[1].append((name.rpartition(".")[2], new))

    def share(self) -> None:
        """Let new modules of one weight share the tensors that are equal in all of them."""
        for _, users in self.groups.values():
            first_name, first = users[0]
            for name, module in users[1:]:
                for held, parameter in list(module._parameters.items()):
                    mine = first._parameters.get(first_name + held.removeprefix(name))
                    if module is not first and held.startswith(name) and _equal(mine, parameter):
                        module._parameters[held] = mine


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return False
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    return one.device.type == "meta" or torch.equal(one, other)


class _Conversion:
    """One walk over a model."""

    def __init__(self, mapping: Classes, custom: Classes, precomputed: bool, allow_meta: bool) -> None:
        self.mapping, self.custom, self.precomputed, self.allow_meta = mapping, custom, precomputed, allow_meta
        self.done: dict[nn.Module, nn.Module] = {}
        self.changes: list[tuple[nn.Module, str, nn.Module]] = []
        self.hooks: list[tuple[nn.Module, dict[str, dict[int, Any]]]] = []
        self.ties = _Ties()

    def convert(self, module: nn.Module, name: str) -> nn.Module:
        """The module that stands in the place of this one, and has converted children."""
        if module in self.done:
            return self.done[module]
        self.done[module] = module
        kind = type_before_parametrizations(module)
        busy = getattr(module, _BUSY, False)
        # these are converted as one, with what is in them
        whole = isinstance(module, FusedModule | RoundedWeight) or kind in self.custom
        if busy or not whole:
            for child_name, child in children(module):
                new = self.convert(child, f"{name}.{child_name}" if name else child_name)
                if new is not child:
                    self.changes.append((module, child_name, child))
                    module._modules[child_name] = new
        if not busy:
            self.done[module] = self._swap(module, name)
        return self.done[module]

    def _swap(self, module: nn.Module, name: str) -> nn.Module:
        hooks = saved_hooks(module)
        try:
            new = swap_module(module, self.mapping, self.custom, self.precomputed, allow_meta=self.allow_meta)
        except (RuntimeError, ValueError, TypeError) as error:
            if not name or type(error) not in (RuntimeError, ValueError, TypeError, QConfigError):
                raise
            raise type(error)(f"{name}: {error}") from error
        if new is not module:
            self.hooks.append((module, hooks))
            self.ties.note(module, new)
            self.done[new] = new
        return new

    def undo(self) -> None:
        """Put every child back, with its hooks."""
        for module, hooks in self.hooks:
            restore_hooks(module, hooks)
        for parent, name, child in reversed(self.changes):
            parent._modules[name] = child


def swap_module(
    mod: nn.Module,
    mapping: Classes,
    custom_module_class_mapping: Classes | None = None,
    use_precomputed_fake_quant: bool = False,
    *,
    allow_meta: bool = False,
) -> nn.Module:
    """The quantized module of one module, with its hooks, or the module itself if it has no qconfig or no counterpart.

    Args:
        mod: what is in it is not looked at.
        mapping: module type -> class with ``from_float``.
        custom_module_class_mapping: module type -> class with ``from_observed``; counts first.
        use_precomputed_fake_quant: see :func:`convert`; passed on to ``from_float`` if that takes it.
        allow_meta: let tensors of a module be on meta beside those of one device.

    Raises:
        RuntimeError: its observer has seen nothing.
        QConfigError: it cannot be quantized as its qconfig says, or is on several devices.
        TypeError: the class has no ``from_float``.
    """
    custom = custom_module_class_mapping or {}
    if not has_qconfig(mod):
        return mod
    kind = type_before_parametrizations(mod)
    compute_weights(mod)
    if kind in custom:
        device = device_of(mod, allow_meta)
        setattr(mod, _BUSY, True)
        try:
            new: nn.Module = custom[kind].from_observed(mod)
        finally:
            delattr(mod, _BUSY)
        new.__dict__.pop(_BUSY, None)
    elif kind in mapping:
        device = device_of(mod, allow_meta)
        make = getattr(mapping[kind], "from_float", None)
        if make is None:
            raise TypeError(f"{mapping[kind]!r}, which {kind.__name__} is mapped to, has no class method from_float")
        takes = "use_precomputed_fake_quant" in inspect.signature(make).parameters
        new = make(mod, use_precomputed_fake_quant=use_precomputed_fake_quant) if takes else make(mod)
    else:
        return mod
    if new is not mod:
        move_hooks(mod, new)
        if device is not None:
            new.to(device)
    return new
