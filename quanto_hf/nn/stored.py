"""How the tensors of a packed weight are held: Parameters that offloading, FSDP, averaging and counting take right.

Parameters, because accelerate's offload leaves buffers on the device, and FSDP shards parameters only. But torch and
others take a Parameter for numbers that can be averaged, converted and counted. A :class:`StoredParameter` differs from
an ordinary one in four Python methods, and is the same to every operator, kernel and compiler.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

# Functions with which averages are computed, without the underscores of their names, and those that write one. A
# multiplication in place, with an addition after it, is not among them: torch refuses both for integers.
_ARITHMETIC = frozenset(
    "add radd sub rsub mul rmul div truediv lerp foreach_add foreach_sub foreach_mul foreach_lerp".split()
)
_WRITES = frozenset({"copy_", "lerp_", "addcdiv_", "_foreach_copy_", "_foreach_lerp_", "_foreach_addcdiv_"})
_SAME = frozenset({"detach", "to", "cpu", "cuda", "clone"})
# An average of equal codes in float32 is this close to the code, relative to it.
_ROUNDING = 4e-7


class Codes(torch.Tensor):
    """What ``detach()`` of integer codes gives: a view that averages of weights leave right.

    Averaging (``torch.optim.swa_utils.AveragedModel`` and most loops that are written by hand) computes
    ``code * decay + code * (1 - decay)`` and writes it into the codes. In float32 that may be 2.9999998, of which an
    integer tensor keeps 2: codes that never change would lose one at each step. Here arithmetic is done in float64, and
    what is written is rounded. Codes that differ have no average, which is an error. It is pickled as a plain tensor.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function on plain tensors.

        Raises:
            ValueError: an average of codes that differ is written.
        """
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if name in _WRITES:
                return _write(func, args, kwargs)
            if (name.strip("_") in _ARITHMETIC and not name.endswith("_")) or name in _DUNDER:
                args, kwargs = tree_map_only(Codes, lambda codes: codes.to(torch.float64), (args, kwargs))
            result = func(*args, **kwargs)
            # still what averages are computed of
            return _view(result) if name in _SAME and type(result) is torch.Tensor else result

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            memo[id(self)] = self.clone()
        copied: torch.Tensor = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


_DUNDER = frozenset(f"__{name}__" for name in _ARITHMETIC)


def _write(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The in-place function in float64, and the integers of what it gives."""
    first, *others = args
    targets = first if isinstance(first, list | tuple) else [first]
    given = [leaf for leaf in tree_leaves((others, kwargs)) if isinstance(leaf, torch.Tensor | float)]
    if not any(isinstance(leaf, float) or leaf.dtype.is_floating_point for leaf in given):
        return func(*args, **kwargs)
    exact = [target.to(torch.float64) if not target.dtype.is_floating_point else target for target in targets]
    func(exact if isinstance(first, list | tuple) else exact[0], *others, **kwargs)
    rounded = [value.round() for value in exact]
    for value, whole in zip(exact, rounded, strict=True):
        if bool(((value - whole).abs() > _ROUNDING * whole.abs()).any()):
            raise ValueError(
                "codes of packed weights that differ have no average; average float weights, and quantize the result"
            )
    for target, whole in zip(targets, rounded, strict=True):
        target.copy_(whole)
    return first


class StoredParameter(nn.Parameter):
    """A stored tensor of a packed weight: codes, scales, zeros, codebooks. It has no gradient, and keeps its dtype.

    - ``numel()`` of the first one of a weight counts weights, less the scales that count themselves, so that sums over
      ``parameters()`` (``num_parameters()`` of transformers, ``print_trainable_parameters()`` of PEFT) are those of the
      float model. ``element_size()`` is bytes per weight, so that their product is the bytes that are stored.
      ``shape`` and ``nbytes`` are those of the stored tensor.
    - ``data = other`` keeps the dtype that is held, and the numbers where ``other`` is a conversion of them: what loops
      over all parameters to change their dtype (``prepare_model_for_kbit_training`` of PEFT) would convert scales.
    - ``detach()`` of integers gives :class:`Codes`, and so does a state dict.
    - One that is made in inference mode is an ordinary tensor, with which one can train later.

    Args:
        data: the tensor.
        requires_grad: False; it is there because accelerate and others give it.
    """

    # what numel() answers; a class attribute, since accelerate makes parameters anew by their type
    weights: ClassVar[int | None] = None

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> "StoredParameter":
        """See the class."""
        data = plain(data)
        with torch.inference_mode(False):
            if data.is_inference():
                data = data.clone()
            made: StoredParameter = torch.Tensor._make_subclass(cls, data, False)
        return made

    def numel(self) -> int:
        """Number of weights, or of elements where another tensor of the weight counts them."""
        return super().numel() if self.weights is None else self.weights

    def nelement(self) -> int:
        """As ``numel()``."""
        return self.numel()

    def element_size(self) -> Any:
        """Bytes of an element as ``numel()`` counts them."""
        return super().element_size() if self.weights is None else bytes_each(self.nbytes, self.weights)

    @property
    def data(self) -> torch.Tensor:
        """The tensor, plain: torch.compile asks for its type."""
        result: torch.Tensor = torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return result

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        value, own = plain(value), self.data
        if value.dtype != own.dtype:
            # a conversion of what is held: its numbers are not rounded for it
            converted = value.device == own.device and torch.equal(value, own.to(value.dtype))
            value = own if converted else value.to(own.dtype)
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    def detach(self) -> torch.Tensor:
        """The tensor: there is no gradient to detach it from."""
        return _view(plain(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> "StoredParameter":
        if id(self) not in memo:
            memo[id(self)] = type(self)(plain(self).clone(memory_format=torch.preserve_format))
        copied: StoredParameter = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return stored_parameter, (plain(self), self.weights)


def stored_parameter(
    data: torch.Tensor, weights: int | None = None, like: torch.Tensor | None = None
) -> StoredParameter:
    """A stored tensor as a Parameter.

    Args:
        data: the tensor.
        weights: what its ``numel()`` is to answer, or None.
        like: a tensor whose Python attributes it gets, such as the mark of transformers for what is not to be
            initialised.

    Example:
        >>> packed = stored_parameter(torch.zeros(4, 8, dtype=torch.uint8), weights=64)
        >>> packed.numel(), packed.element_size(), packed.nbytes, packed.requires_grad
        (64, 0.5, 32, False)
    """
    made = _counting(weights)(data)
    if like is not None:
        vars(made).update(vars(like))
    return made


@cache
def _counting(weights: int | None) -> type[StoredParameter]:
    """The class for a number of weights: few layers of a model differ in it."""
    return StoredParameter if weights is None else type("StoredParameter", (StoredParameter,), {"weights": weights})


class BytesEach(float):
    """Bytes per element that need not be whole; times a number of elements they are whole bytes, and an int."""

    def __mul__(self, count: Any) -> Any:
        product = float(self) * count
        return round(product) if isinstance(count, int) and abs(product - round(product)) < 1e-3 else product

    __rmul__ = __mul__


def bytes_each(nbytes: int, count: int) -> float:
    """``nbytes / count``; 0 of nothing.

    Example:
        >>> 3 * bytes_each(1, 3)
        1
    """
    return BytesEach(nbytes / count) if count else 0.0


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor without a class of its own."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor) if isinstance(tensor, StoredParameter | Codes) else tensor


def _view(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype.is_floating_point else tensor.as_subclass(Codes)
