"""What decides about a value, in JSON types: equal for equal values, in every process, and different for others.

``repr`` is neither: of an object it has the address, and of a large tensor not all of the numbers.
"""

import hashlib
import json
import math
import pickle
import uuid
from collections.abc import Mapping
from enum import Enum
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch


def identity(value: Any) -> Any:
    """The value in JSON types, by its contents.

    Tensors count by their bytes, objects by class and attributes, functions by name, code and what they have caught.
    What cannot be told from others is like nothing, not even itself: what is kept under such an identity is made again,
    and never taken for something else.

    Example:
        >>> identity({"dims": (0, 1), "dtype": torch.float16})
        ['dict', [['dims', ['tuple', 0, 1]], ['dtype', ['torch', 'torch.float16']]]]
    """
    return _identity(value, ())


def _identity(value: Any, inside: tuple[int, ...]) -> Any:
    if value is None or type(value) in (int, str):
        return value
    if isinstance(value, bool):
        # True is equal to 1
        return ["bool", value]
    if type(value) is float:
        # NaN is not equal to itself
        return value if math.isfinite(value) else ["float", repr(value)]
    if id(value) in inside:
        # how many steps back it is held
        return ["back", len(inside) - inside.index(id(value))]
    inside = (*inside, id(value))
    if isinstance(value, list | tuple):
        return [type(value).__name__, *(_identity(item, inside) for item in value)]
    if isinstance(value, set | frozenset):
        return [type(value).__name__, *sorted((_identity(item, inside) for item in value), key=json.dumps)]
    if isinstance(value, Mapping):
        pairs = [[_identity(key, inside), _identity(item, inside)] for key, item in value.items()]
        return [type(value).__name__, sorted(pairs, key=lambda pair: json.dumps(pair[0]))]
    if isinstance(value, torch.dtype | torch.device | torch.Size):
        return ["torch", str(value)]
    if isinstance(value, torch.Tensor):
        return ["tensor", str(value.dtype), *value.shape, _digest_of(value)]
    if isinstance(value, type):
        return ["class", _name(value)]
    if isinstance(value, Enum):
        return ["enum", _name(type(value)), value.name]
    if isinstance(value, partial):
        return ["partial", *(_identity(part, inside) for part in (value.func, value.args, value.keywords))]
    if isinstance(value, MethodType):
        return ["method", _identity(value.__func__, inside), _identity(value.__self__, inside)]
    if isinstance(value, FunctionType):
        caught = [cell.cell_contents for cell in value.__closure__ or ()]
        held = [_identity(part, inside) for part in (caught, value.__defaults__, value.__kwdefaults__)]
        return ["function", _name(value), _code(value.__code__), *held]
    return _of_object(value, inside)


def _of_object(value: Any, inside: tuple[int, ...]) -> Any:
    slots = [name for cls in type(value).__mro__ for name in _slots(cls) if hasattr(value, name)]
    if hasattr(value, "__dict__") or slots:
        held = {**{name: getattr(value, name) for name in slots}, **getattr(value, "__dict__", {})}
        return ["object", _name(type(value)), _identity(held, inside)]
    try:
        return ["pickle", _name(type(value)), _digest(pickle.dumps(value, 4))]
    except Exception:  # whatever a type of somebody else raises
        return ["unknown", _name(type(value)), uuid.uuid4().hex]


def _slots(cls: type) -> tuple[str, ...]:
    slots = cls.__dict__.get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _code(code: CodeType) -> list[Any]:
    constants = [_code(item) if isinstance(item, CodeType) else repr(item) for item in code.co_consts]
    return [_digest(code.co_code), list(code.co_names), constants]


def _digest_of(tensor: torch.Tensor) -> str:
    if tensor.is_meta:
        return "meta"
    flat = tensor.detach().to_dense().cpu().contiguous().view(-1)
    return _digest(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else ""


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
