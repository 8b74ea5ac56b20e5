"""Modules in a row become one, before a model is prepared."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.nn.utils.parametrize import type_before_parametrizations

from quanto_hf.eager import fused
from quanto_hf.eager.hooks import move_hooks
from quanto_hf.eager.modules import QConfigError

__all__ = [
    "fuse_conv_bn",
    "fuse_conv_bn_relu",
    "fuse_convtranspose_bn",
    "fuse_known_modules",
    "fuse_linear_bn",
    "fuse_modules",
    "fuse_modules_qat",
    "get_fuser_method",
]

# (is_qat, *modules) -> the fused module
Fuser = Callable[..., nn.Module]
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _check_norm(is_qat: bool, *modules: Any) -> None:
    """Whether a batch norm can be folded into what stands before it.

    Raises:
        QConfigError: it cannot.
    """
    first, norm = modules[:2]
    names = " and ".join(type(module).__name__ for module in modules)
    if len({module.training for module in modules}) > 1:
        raise QConfigError(f"{names} must be in the same mode, all in train or all in eval, to be fused")
    outputs = getattr(first, "out_channels", None) or first.out_features
    if norm.num_features != outputs:
        raise QConfigError(f"{names} cannot be fused: {outputs} outputs, but a batch norm of {norm.num_features}")
    if not norm.track_running_stats or (is_qat and not norm.affine):
        raise QConfigError(f"{names} cannot be fused: the batch norm has no running statistics, or no weight to train")
    if not is_qat and norm.training:
        raise QConfigError(
            f"{names} are in training mode; call model.eval() before fuse_modules, or use fuse_modules_qat"
        )


def _row(kind: str, *modules: Any) -> nn.Module:
    """The class of :mod:`quanto_hf.eager.fused` for modules of which the first is a convolution, such as ConvBn2d."""
    made: nn.Module = getattr(fused, f"{kind}{len(modules[0].kernel_size)}d")(*modules)
    return made


def _folded(conv: Any, bn: Any, transpose: bool = False) -> nn.Module:
    made: nn.Module = fuse_conv_bn_eval(conv, bn, transpose)
    return made


def fuse_conv_bn(is_qat: bool, conv: Any, bn: Any) -> nn.Module:
    """A convolution and its batch norm: folded, or for training side by side."""
    _check_norm(is_qat, conv, bn)
    return _row("ConvBn", conv, bn) if is_qat else _folded(conv, bn)


def fuse_conv_bn_relu(is_qat: bool, conv: Any, bn: Any, relu: nn.Module) -> nn.Module:
    """A convolution, its batch norm and a ReLU."""
    _check_norm(is_qat, conv, bn, relu)
    return _row("ConvBnReLU", conv, bn, relu) if is_qat else _row("ConvReLU", _folded(conv, bn), relu)


def fuse_linear_bn(is_qat: bool, linear: Any, bn: Any) -> nn.Module:
    """A linear layer and its batch norm."""
    _check_norm(is_qat, linear, bn)
    return fused.LinearBn1d(linear, bn) if is_qat else fuse_linear_bn_eval(linear, bn)


def fuse_convtranspose_bn(is_qat: bool, convt: Any, bn: Any) -> nn.Module:
    """A transposed convolution and its batch norm; in eval mode only."""
    if is_qat:
        raise QConfigError(
            "a transposed convolution and its batch norm cannot be trained fused; leave them as they are"
        )
    _check_norm(is_qat, convt, bn)
    return _folded(convt, bn, transpose=True)


def _in_a_row(made: type[nn.Sequential]) -> Fuser:
    def fuse(is_qat: bool, *modules: nn.Module) -> nn.Module:
        return made(*modules)

    return fuse


_FUSERS: dict[tuple[type[nn.Module], ...], Fuser] = {
    (nn.Linear, nn.BatchNorm1d): fuse_linear_bn,
    (nn.Linear, nn.ReLU): _in_a_row(fused.LinearReLU),
    (nn.BatchNorm2d, nn.ReLU): _in_a_row(fused.BNReLU2d),
    (nn.BatchNorm3d, nn.ReLU): _in_a_row(fused.BNReLU3d),
}
for _conv, _norm, _transposed, _relu in zip(
    _CONVS, _NORMS, _TRANSPOSED, (fused.ConvReLU1d, fused.ConvReLU2d, fused.ConvReLU3d), strict=True
):
    _FUSERS[_conv, _norm] = fuse_conv_bn
    _FUSERS[_conv, _norm, nn.ReLU] = fuse_conv_bn_relu
    _FUSERS[_conv, nn.ReLU] = _in_a_row(_relu)
    _FUSERS[_transposed, _norm] = fuse_convtranspose_bn


def get_fuser_method(
    op_list: Sequence[type[nn.Module]], additional_fuser_method_mapping: Mapping[Any, Fuser] | None = None
) -> Fuser:
    """What fuses modules of these types, called as ``fuse(is_qat, *modules)``.

    Raises:
        QConfigError: nothing does.
    """
    found = {**_FUSERS, **(additional_fuser_method_mapping or {})}.get(tuple(op_list))
    if found is None:
        names = ", ".join(kind.__name__ for kind in op_list)
        raise QConfigError(f"modules of the types ({names}) cannot be fused; did not find fuser method for them")
    return found


def fuse_known_modules(
    mod_list: Sequence[nn.Module], is_qat: bool, additional_fuser_method_mapping: Mapping[Any, Fuser] | None = None
) -> list[nn.Module]:
    """The fused module, and an ``nn.Identity`` for each of the others.

    Hooks before the first module, and after the last one, move to the fused module.
    """
    fuse = get_fuser_method([type_before_parametrizations(m) for m in mod_list], additional_fuser_method_mapping)
    first, last = mod_list[0], mod_list[-1]
    made = fuse(is_qat, *mod_list)
    before, after = nn.Module(), nn.Module()
    _take(first, before, "_forward_pre_hooks")
    _take(last, after, "_forward_hooks")
    for inner in made.modules():
        # a folded convolution is a copy of the first module, hooks included
        if inner is not made and type(inner) is type(first):
            inner._forward_pre_hooks.clear()
    if type(made) is type(first):
        made._forward_pre_hooks.clear()
        made._forward_hooks.clear()
    move_hooks(before, made)
    move_hooks(after, made)
    return [made, *(nn.Identity().train(first.training) for _ in mod_list[1:])]


def _take(old: nn.Module, new: nn.Module, table: str) -> None:
    hooks = getattr(old, table)
    getattr(new, table).update(hooks)
    for flags in (f"{table}_with_kwargs", "_forward_hooks_always_called"):
        if hasattr(old, flags):
            getattr(new, flags).update({key: flag for key, flag in getattr(old, flags).items() if key in hooks})
    hooks.clear()


def _fuse(
    model: nn.Module, modules_to_fuse: Sequence[Any], is_qat: bool, inplace: bool, fuser_func: Any, config: Any
) -> nn.Module:
    if not inplace:
        model = copy.deepcopy(model)
    rows = [modules_to_fuse] if all(isinstance(name, str) for name in modules_to_fuse) else modules_to_fuse
    more = (config or {}).get("additional_fuser_method_mapping", {})
    for names in rows:
        made = fuser_func([model.get_submodule(name) for name in names], is_qat, more)
        for name, module in zip(names, made, strict=True):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
    return model


def fuse_modules(
    model: nn.Module,
    modules_to_fuse: Sequence[Any],
    inplace: bool = False,
    fuser_func: Callable[..., list[nn.Module]] = fuse_known_modules,
    fuse_custom_config_dict: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Fuse modules that are called one after the other, of a model in eval mode.

    These rows can be fused: a convolution or linear layer and its batch norm, which is folded into the weight; the same
    and a ReLU after the convolution; a convolution, linear layer or batch norm and a ReLU; a transposed convolution and
    its batch norm.

    Args:
        model: in eval mode.
        modules_to_fuse: names of the modules of one row, or a list of such lists.
        inplace: change the model, and not a copy.
        fuser_func: makes the new modules of those of a row.
        fuse_custom_config_dict: ``"additional_fuser_method_mapping"``: types -> function, that count first.

    Returns:
        The model, with the fused module in the first place of each row and ``nn.Identity`` in the others.

    Raises:
        QConfigError: there is no way to fuse these modules.
        AttributeError: there is no module of that name.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()).eval()
        >>> [type(module).__name__ for module in fuse_modules(model, ["0", "1", "2"])]
        ['ConvReLU2d', 'Identity', 'Identity']
    """
    return _fuse(model, modules_to_fuse, False, inplace, fuser_func, fuse_custom_config_dict)


def fuse_modules_qat(
    model: nn.Module,
    modules_to_fuse: Sequence[Any],
    inplace: bool = False,
    fuser_func: Callable[..., list[nn.Module]] = fuse_known_modules,
    fuse_custom_config_dict: Mapping[str, Any] | None = None,
) -> nn.Module:
    """As :func:`fuse_modules`, for training: a batch norm is not folded yet."""
    return _fuse(model, modules_to_fuse, True, inplace, fuser_func, fuse_custom_config_dict)
