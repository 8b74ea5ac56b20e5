"""Observers for a whole model."""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from quanto_hf.eager.custom import TO_OBSERVED, classes, no_observer_set
from quanto_hf.eager.fused import FusedModule
from quanto_hf.eager.hooks import OBSERVER, attach, move_hooks
from quanto_hf.eager.mappings import get_default_qconfig_propagation_list, special_observer
from quanto_hf.eager.modules import FloatFunctional, QConfigError, QFunctional
from quanto_hf.eager.propagate import propagate_qconfig_
from quanto_hf.eager.stubs import DeQuantStub
from quanto_hf.eager.walk import children, device_of, has_qconfig, is_leaf

__all__ = ["prepare"]


def prepare(
    model: nn.Module,
    inplace: bool = False,
    allow_list: Iterable[type[nn.Module]] | None = None,
    observer_non_leaf_module_list: Iterable[type[nn.Module]] | None = None,
    prepare_custom_config_dict: Mapping[str, Any] | None = None,
    *,
    allow_meta: bool = False,
) -> nn.Module:
    """Attach observers to the outputs of modules that have a ``qconfig``. The next step is to run the model on data.

    Args:
        model: with the attribute ``qconfig`` on it, or on modules in it; it is passed on to what is in them.
        inplace: change the model, and not a copy.
        allow_list: types of leaves to observe; None is :func:`get_default_qconfig_propagation_list`.
        observer_non_leaf_module_list: types to observe although they have children, in place of these.
        prepare_custom_config_dict: see :func:`get_default_custom_config_dict`, which None stands for; and
            :func:`propagate_qconfig_`.
        allow_meta: let tensors be on meta beside those of one device.

    Returns:
        The model or the copy; a bare module that a custom class observes is replaced.

    Raises:
        QConfigError: the model is on several devices, or a module type does not support its qconfig.
        TypeError: a qconfig is none.

    Warns:
        UserWarning: no module has a qconfig.
    """
    custom = classes(prepare_custom_config_dict, TO_OBSERVED, "from_float")
    device = device_of(model, allow_meta)
    if not inplace:
        model = copy.deepcopy(model)
    propagate_qconfig_(model, None, prepare_custom_config_dict)
    if not any(has_qconfig(module) for module in model.modules()):
        warnings.warn(
            "None of the submodule got qconfig applied: set model.qconfig, or call propagate_qconfig_ with a "
            "qconfig_dict, before prepare",
            stacklevel=2,
        )
    leaves = get_default_qconfig_propagation_list() if allow_list is None else set(allow_list)
    blocks = set(observer_non_leaf_module_list or ())
    return _Preparation(leaves, blocks, custom, tuple(no_observer_set()), device).observe(model)


class _Preparation:
    """One walk over a model."""

    def __init__(
        self,
        leaves: set[type[nn.Module]],
        blocks: set[type[nn.Module]],
        custom: dict[type[nn.Module], Any],
        unobserved: tuple[type[nn.Module], ...],
        device: torch.device | None,
    ) -> None:
        self.leaves, self.blocks, self.custom, self.unobserved, self.device = leaves, blocks, custom, unobserved, device
        self.done: dict[nn.Module, nn.Module] = {}

    def observe(self, module: nn.Module) -> nn.Module:
        """Attach observers to a module, or to what is in it; the module that stands in its place."""
        if module not in self.done:
            self.done[module] = module
            self.done[module] = self._observe(module)
        return self.done[module]

    def _observe(self, module: nn.Module) -> nn.Module:
        kind = type_before_parametrizations(module)
        if kind is nn.Dropout:
            return module
        if isinstance(module, FloatFunctional | QFunctional):
            self._functional(module)
        elif isinstance(module, FusedModule) or kind in self.blocks:
            self.insert(module)
        elif (special := special_observer(module)) is not None:
            self.insert(module, special)
        elif has_qconfig(module) and kind in self.custom:
            observed: nn.Module = self.custom[kind].from_float(module)
            if not has_qconfig(observed):
                observed.qconfig = module.qconfig
            move_hooks(module, observed)
            if not isinstance(observed, self.unobserved):
                self.insert(observed)
            return observed
        else:
            leaf = is_leaf(module) or hasattr(module, "weight_fake_quant")
            for name, child in children(module):
                module._modules[name] = self.observe(child)
            if leaf and not isinstance(module, nn.Sequential) and kind in self.leaves:
                self.insert(module)
        return module

    def _functional(self, module: Any) -> None:
        if not has_qconfig(module):
            return
        if not hasattr(module, OBSERVER):
            raise QConfigError(f"{type(module).__name__} has no {OBSERVER}; its __init__ must call that of its base")
        if isinstance(module.activation_post_process, nn.Identity) and module.qconfig.activation is not None:
            module.activation_post_process = self.make(module.qconfig.activation)

    def insert(self, module: nn.Module, special: Callable[..., nn.Module] | None = None) -> None:
        """Attach an observer, unless the module has one or wants none."""
        qconfig: Any = getattr(module, "qconfig", None)
        if qconfig is None or isinstance(module, DeQuantStub) or OBSERVER in module._modules:
            return
        how = special or qconfig.activation
        if how is not None:
            attach(module, self.make(how))

    def make(self, how: Callable[..., nn.Module]) -> nn.Module:
        """A new observer on the device of the model."""
        if self.device is None:
            return how()
        # not on a default device of torch first, which may have no memory
        with self.device:
            observer = how()
        return observer.to(self.device)
