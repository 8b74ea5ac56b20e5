"""Which module gets which qconfig."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from quanto_hf.eager.qconfig import check_qconfig
from quanto_hf.eager.stubs import DeQuantStub, QuantStub, QuantWrapper
from quanto_hf.eager.walk import children, has_qconfig, is_leaf

__all__ = ["add_quant_dequant", "propagate_qconfig_"]

_MISSING = object()


def propagate_qconfig_(
    module: nn.Module,
    qconfig_dict: Mapping[Any, Any] | None = None,
    prepare_custom_config_dict: Mapping[str, Any] | None = None,
) -> None:
    """Give each module its qconfig, in place.

    What counts most stands last: that of the parent, that of the type, that of the name, and one that the module has as
    an attribute already. None leaves a module in float, and what is in it unless it says otherwise.

    Args:
        module: any model.
        qconfig_dict: name or type of a module -> QConfig or None; ``""`` is the model.
        prepare_custom_config_dict: modules named in ``"non_traceable_module_name"``, by their last or whole name, and
            types in ``"non_traceable_module_class"`` are left out, with all that is in them, at any depth.

    Raises:
        TypeError: a value is not a QConfig, or a key neither a name nor a type. Nothing has been changed then.
        QConfigError: a module type does not support its qconfig.

    Example:
        >>> from quanto_hf.eager import default_qconfig
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> propagate_qconfig_(model, {nn.Linear: default_qconfig})
        >>> model[0].qconfig is default_qconfig, model[1].qconfig
        (True, None)
    """
    rules, custom = dict(qconfig_dict or {}), prepare_custom_config_dict or {}
    for key, qconfig in rules.items():
        if not isinstance(key, str | type):
            raise TypeError(f"qconfig_dict has the key {key!r}, which is neither the name nor the type of a module")
        check_qconfig(qconfig, name=repr(key))
    names = set(custom.get("non_traceable_module_name", ()))
    kinds = set(custom.get("non_traceable_module_class", ()))
    found: list[tuple[nn.Module, Any]] = []
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, name: str, parent: Any) -> None:
        # a module with two names gets the qconfig of the first one
        if module in seen:
            return
        seen.add(module)
        qconfig = rules.get(type_before_parametrizations(module), parent)
        qconfig = rules.get(name, qconfig)
        own: Any = getattr(module, "qconfig", _MISSING)
        qconfig = qconfig if own is _MISSING else own
        check_qconfig(qconfig, module, name or type(module).__name__)
        found.append((module, qconfig))
        for child_name, child in children(module):
            whole = f"{name}.{child_name}" if name else child_name
            if not {child_name, whole} & names and type(child) not in kinds:
                visit(child, whole, qconfig)

    visit(module, "", None)
    for one, qconfig in found:
        one.qconfig = qconfig


def add_quant_dequant(module: nn.Module) -> nn.Module:
    """Put each leaf that has a qconfig between a QuantStub and a DeQuantStub, in place.

    Stubs, and modules that are wrapped already, stay as they are.

    Returns:
        The model itself, or a new QuantWrapper if it is a leaf.
    """
    made: dict[nn.Module, nn.Module] = {}

    def wrap(module: nn.Module) -> nn.Module:
        if module in made or isinstance(module, QuantStub | DeQuantStub | QuantWrapper):
            return made.get(module, module)
        made[module] = QuantWrapper(module) if is_leaf(module) and has_qconfig(module) else module
        if made[module] is module:
            for name, child in children(module):
                module._modules[name] = wrap(child)
        return made[module]

    return wrap(module)
