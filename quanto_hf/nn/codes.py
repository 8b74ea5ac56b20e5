"""Arithmetic on integer codes, as averages of weights do it: exact for codes that are equal, an error for others.

An average of equal codes, ``code * decay + code * (1 - decay)``, may be 2.9999998 in float32, of which an integer
tensor keeps 2: codes that never change would lose one at each step. So averages are computed in float64 and rounded.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

# Names without their underscores: functions of averages that give a new tensor, those that write one, those that scale
# one in place, and those that give the same numbers.
_ARITHMETIC = frozenset(
    "add radd sub rsub mul rmul div truediv rtruediv lerp foreach_add foreach_sub foreach_mul foreach_lerp".split()
)
_DIVISIONS = frozenset({"div", "truediv", "rtruediv"})
_WRITES = frozenset("copy add iadd sub isub lerp addcdiv foreach_copy foreach_lerp foreach_addcdiv".split())
_SCALES = frozenset("mul imul div itruediv foreach_mul foreach_div".split())
_SAME = frozenset("detach to cpu cuda clone float double half bfloat16 type type_as".split())
# An average of equal codes in float32 is this close to the code, relative to it.
_ROUNDING = 4e-7
DIFFER = (
    "codes of packed weights that differ have no average; average float weights, and quantize the result. Where they "
    "are equal, leave out parameters without requires_grad, which never change"
)
NO_SCALE = (
    "codes of packed weights cannot be scaled in place: they are integers. An average is written with copy_ or lerp_ "
    "(ema.copy_(decay * ema + (1 - decay) * p)); parameters without requires_grad need none"
)


class Codes(torch.Tensor):
    """What ``detach()`` of integer codes gives, and what is computed with it: averages of weights leave codes right.

    Averages (``torch.optim.swa_utils.AveragedModel`` and most loops that are written by hand) are computed in float64,
    and rounded where they become integers again. Arithmetic with integers alone is that of torch. A tensor of codes is
    pickled as a plain one.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function on plain tensors.

        Raises:
            ValueError: an average of codes that differ is written, or codes are scaled in place.
        """
        given, kwargs = getattr(func, "__name__", ""), kwargs or {}
        in_place, name = _in_place(given), given.strip("_")
        with torch._C.DisableTorchFunctionSubclass():
            if in_place and name in _SCALES and _is_int(args[0]) and _has_float(args[1:], kwargs):
                raise ValueError(NO_SCALE)
            if in_place and name in _WRITES:
                return write(func, args, kwargs)
            averages = name in _ARITHMETIC and not in_place and "out" not in kwargs
            if averages and (name in _DIVISIONS or _has_float(args, kwargs) or _how_many(args, kwargs) > 1):
                args, kwargs = tree_map_only(Codes, lambda codes: codes.to(torch.float64), (args, kwargs))
            result = func(*args, **kwargs)
            if name in _SAME:
                return _same(func, args, kwargs, result)
            # still what averages are computed of
            return tree_map_only(torch.Tensor, _still, result) if averages else result

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            memo[id(self)] = self.clone()
        copied: torch.Tensor = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def as_codes(tensor: torch.Tensor, dtype: torch.dtype, within: float | None = None) -> torch.Tensor | None:
    """Float numbers as integers, rounded; None where they are no integers of this dtype but for the rounding of one
    average in float32.

    Args:
        tensor: the numbers.
        dtype: of the integers.
        within: how far a number may be from an integer, where it is of many averages.

    Example:
        >>> as_codes(torch.tensor([2.9999998, 5.0]), torch.int8), as_codes(torch.tensor([2.9]), torch.int8)
        (tensor([3, 5], dtype=torch.int8), None)
    """
    exact = tensor.to(torch.float64)
    whole = exact.round()
    info = torch.iinfo(dtype)
    close = (exact - whole).abs() <= (_ROUNDING * whole.abs() if within is None else within)
    fits = (whole >= info.min) & (whole <= info.max)
    return whole.to(dtype) if bool((close & fits).all()) else None


def write(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function that writes its first argument, or the tensors of this list: in float64, and rounded.

    Raises:
        ValueError: what it gives is not whole.
    """
    first, *others = args
    if not _has_float(others, kwargs):
        return func(*args, **kwargs)
    several = isinstance(first, list | tuple)
    targets = list(first) if several else [first]
    exact = [target.to(torch.float64) if _is_int(target) else target for target in targets]
    # lerp_ takes one dtype only
    others, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(torch.float64) if _is_int(t) else t, (others, kwargs))
    func(exact if several else exact[0], *others, **kwargs)
    pairs = [(target, value) for target, value in zip(targets, exact, strict=True) if target is not value]
    rounded = [as_codes(value, target.dtype) for target, value in pairs]
    # all or none
    if any(whole is None for whole in rounded):
        raise ValueError(DIFFER)
    for (target, _), whole in zip(pairs, rounded, strict=True):
        target.copy_(whole)
    return first


def _same(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """The result of a conversion or copy."""
    if not isinstance(result, torch.Tensor):
        return result
    if _is_int(result) and not _is_int(args[0]) and result.device.type != "meta":
        # truncated, as of any floats, unless they are codes but for their rounding
        whole = as_codes(args[0], result.dtype)
        result = result if whole is None else func(whole, *args[1:], **kwargs)
    return result.as_subclass(Codes)


def _still(tensor: torch.Tensor) -> torch.Tensor:
    """Floats as codes that are averaged; integers as they are."""
    return tensor if _is_int(tensor) else tensor.as_subclass(Codes)


def _in_place(name: str) -> bool:
    if name.startswith("__"):
        return name.startswith("__i") and name.strip("_") in _WRITES | _SCALES
    return name.endswith("_")


def _is_int(first: Any) -> bool:
    """Whether a tensor, or one of a list, holds integers."""
    return any(isinstance(t, torch.Tensor) and not t.dtype.is_floating_point for t in tree_leaves(first))


def _has_float(args: Any, kwargs: Any) -> bool:
    leaves = tree_leaves((args, kwargs))
    return any(isinstance(x, float) or (isinstance(x, torch.Tensor) and x.dtype.is_floating_point) for x in leaves)


def _how_many(args: Any, kwargs: Any) -> int:
    return sum(isinstance(leaf, Codes) for leaf in tree_leaves((args, kwargs)))
