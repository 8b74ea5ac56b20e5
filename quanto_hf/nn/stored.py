"""How the tensors of a packed weight are held: Parameters that offloading, FSDP, averaging and counting take right.

Parameters, because accelerate's offload leaves buffers on the device, and FSDP shards parameters only. But torch and
others take a Parameter for numbers that can be averaged, converted, counted and trained. A :class:`StoredParameter`
differs from an ordinary one in Python methods, and is the same to every operator, kernel and compiler.
"""

from functools import cache
from typing import Any, ClassVar

import torch
from torch import nn

from quanto_hf.nn.codes import DIFFER, Codes, as_codes


class StoredParameter(nn.Parameter):
    """A stored tensor of a packed weight: codes, scales, zeros, codebooks. It has no gradient, and keeps its dtype.

    - ``numel()`` of the first one of a weight counts weights, less the scales that count themselves, so that sums over
      ``parameters()`` (``num_parameters()`` of transformers, ``print_trainable_parameters()`` of PEFT) are those of the
      float model. It is a :class:`Count`: times the size of an element it is the bytes that are stored. ``shape``,
      ``element_size()`` and ``nbytes`` are those of the stored tensor.
    - ``requires_grad`` stays False, so that a loop that unfreezes all parameters does so with those that can train.
    - ``data = other`` keeps the dtype that is held, and the numbers where ``other`` is a conversion of them: what loops
      over all parameters to change their dtype (``prepare_model_for_kbit_training`` of PEFT) would convert scales.
    - ``detach()`` of integers gives :class:`~quanto_hf.nn.codes.Codes`, and so does a state dict; what is written into
      integers in place (``copy_``, ``add_``, ``sub_``, ``lerp_``) is rounded as theirs. ``data`` is a plain tensor,
      since torch.compile and torch.export ask for its type: ``p.data.copy_(average)`` truncates as with any integers.
      Write ``p.copy_(average)`` under ``torch.no_grad()``.
    - One that is made in inference mode is an ordinary tensor, with which one can train later.

    Args:
        data: the tensor.
        requires_grad: False; it is there because accelerate and others give it.
    """

    # what numel() answers; a class attribute, since accelerate makes parameters anew by their type
    weights: ClassVar[int | None] = None
    # another one whenever other memory is put behind this tensor; a bound call asks for it
    place: object = None

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> "StoredParameter":
        """See the class."""
        data = plain(data)
        with torch.inference_mode(False):
            if data.is_inference():
                data = data.clone()
            made: StoredParameter = torch.Tensor._make_subclass(cls, data, False)
        made.place = object()
        return made

    # ------------------------------------------------------------------------------------------------ counting

    def numel(self) -> int:
        """Number of weights, or of elements where another tensor of the weight counts them."""
        if self.weights is None:
            return super().numel()
        # torch.compile makes ints only
        return self.weights if torch.compiler.is_compiling() else Count(self.weights, self.itemsize, self.nbytes)

    def nelement(self) -> int:
        """As ``numel()``."""
        return self.numel()

    # ------------------------------------------------------------------------------------------------ training

    def requires_grad_(self, requires_grad: bool = True) -> "StoredParameter":
        """Nothing: it has no gradient."""
        return self

    @property
    def requires_grad(self) -> bool:
        """False."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        pass

    # ------------------------------------------------------------------------------------------------ writing

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
            value = own if converted else _of_dtype(value, own.dtype)
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.place = object()

    def set_(self, *args: Any, **kwargs: Any) -> Any:
        super().set_(*args, **kwargs)
        self.place = object()
        return self

    def resize_(self, *args: Any, **kwargs: Any) -> Any:
        super().resize_(*args, **kwargs)
        self.place = object()
        return self

    def detach(self) -> torch.Tensor:
        """The tensor: there is no gradient to detach it from."""
        tensor = plain(self)
        return tensor if tensor.dtype.is_floating_point else tensor.as_subclass(Codes)

    def _write(self, name: str, *args: Any, **kwargs: Any) -> "StoredParameter":
        getattr(self.detach(), name)(*args, **kwargs)
        return self

    def copy_(self, *args: Any, **kwargs: Any) -> Any:
        return self._write("copy_", *args, **kwargs)

    def add_(self, *args: Any, **kwargs: Any) -> Any:
        return self._write("add_", *args, **kwargs)

    def sub_(self, *args: Any, **kwargs: Any) -> Any:
        return self._write("sub_", *args, **kwargs)

    def mul_(self, *args: Any, **kwargs: Any) -> Any:
        return self._write("mul_", *args, **kwargs)

    def lerp_(self, *args: Any, **kwargs: Any) -> Any:
        return self._write("lerp_", *args, **kwargs)

    __iadd__, __isub__, __imul__ = add_, sub_, mul_

    # ------------------------------------------------------------------------------------------------ copies

    def __deepcopy__(self, memo: dict[int, Any]) -> "StoredParameter":
        if id(self) not in memo:
            memo[id(self)] = type(self)(plain(self).clone(memory_format=torch.preserve_format))
        copied: StoredParameter = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        # an ordinary one: torch.load(weights_only=True) knows no other; a module makes it its own again
        return nn.Parameter(plain(self), requires_grad=False).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def stored_parameter(data: torch.Tensor, weights: int | None = None, like: torch.Tensor | None = None) -> nn.Parameter:
    """A stored tensor as a Parameter: a :class:`StoredParameter`, unless it wraps others (fake tensors, shards).

    Args:
        data: the tensor.
        weights: what its ``numel()`` is to answer, or None.
        like: a tensor whose Python attributes it gets, such as the mark of transformers for what is not to be
            initialised.

    Example:
        >>> packed = stored_parameter(torch.zeros(4, 8, dtype=torch.uint8), weights=64)
        >>> packed.numel(), packed.numel() * packed.element_size(), packed.nbytes, packed.requires_grad
        (64, 32, 32, False)
    """
    if type(data).__torch_dispatch__ != torch.Tensor.__torch_dispatch__:
        return data if isinstance(data, nn.Parameter) else nn.Parameter(data, requires_grad=False)
    made = _counting(weights)(data)
    if like is not None:
        vars(made).update(vars(like))
    return made


@cache
def _counting(weights: int | None) -> type[StoredParameter]:
    """The class for a number of weights: few layers of a model differ in it."""
    return StoredParameter if weights is None else type("StoredParameter", (StoredParameter,), {"weights": weights})


class Count(int):
    """A number of weights that are packed in a tensor of fewer or smaller elements. Times the size of an element, as
    accelerate, torch and others compute sizes (``numel() * element_size()``, ``numel() * dtype.itemsize``), it is the
    bytes of the tensor; otherwise it is an int.

    Args:
        weights: the number.
        itemsize: bytes of an element.
        nbytes: bytes of the tensor.

    Example:
        >>> count = Count(64, itemsize=1, nbytes=32)
        >>> count, count * 1, count * 4, count + 1
        (64, 32, 256, 65)
    """

    itemsize: int
    nbytes: int

    def __new__(cls, weights: int, itemsize: int, nbytes: int) -> "Count":
        """See the class."""
        count = super().__new__(cls, weights)
        count.itemsize, count.nbytes = itemsize, nbytes
        return count

    def __mul__(self, other: Any) -> Any:
        # a bool is no size
        return self.nbytes if type(other) is int and other == self.itemsize else super().__mul__(other)

    __rmul__ = __mul__

    def __reduce__(self) -> Any:
        return int, (int(self),)


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


def _of_dtype(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Other numbers in the dtype that is held.

    Raises:
        ValueError: an average of codes that differ.
    """
    if dtype.is_floating_point or not value.dtype.is_floating_point or value.device.type == "meta":
        return value.to(dtype)
    whole = as_codes(value, dtype)
    if whole is None:
        raise ValueError(DIFFER)
    return whole
