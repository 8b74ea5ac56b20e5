"""Weights that are held in 8 or 4 bits, or in float16, with the scale that an observer has found.

The one place in which modules of the eager mode know how a weight is stored.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from quanto_hf.eager.grid import round_to_grid
from quanto_hf.eager.modules.errors import QConfigError
from quanto_hf.eager.modules.kept import KeepsNamed
from quanto_hf.nn.observers import PerChannelMinMaxObserver
from quanto_hf.nn.weight_writes import refuse_write
from quanto_hf.ops import pack
from quanto_hf.schemes import Affine

INT8 = Affine("int8")
INT4 = Affine("int4", symmetric=False)
# what torch calls them, and what their codes are stored as
CODES = {"qint8": torch.int8, "int8": torch.int8, "quint8": torch.uint8, "uint8": torch.uint8, "quint4x2": torch.uint8}

_REFERENCES: dict[type[Any], type[Any]] = {}


@dataclass
class Held:
    """How one weight is held.

    Args:
        dtype: name of the number type.
        shape: of the float weight.
        axis: dimension that has scales.
        quant_min: smallest code.
        quant_max: largest code.
        float_zero: whether zero points may be any float.
    """

    dtype: str
    shape: tuple[int, ...]
    axis: int = 0
    quant_min: int = 0
    quant_max: int = 0
    float_zero: bool = False


def weight_observer(mod: Any, precomputed: bool = False) -> Any:
    """An observer, or fake quantization, of the weight of ``mod``, which has seen the weight.

    Args:
        mod: with ``weight_fake_quant``, or with a qconfig.
        precomputed: take the scale that the fake quantization holds, whatever the weight is now.
    """
    fake: Any = getattr(mod, "weight_fake_quant", None)
    if fake is not None and precomputed:
        return Precomputed(fake)
    # a module with a batch norm multiplies its weight with something before it is rounded
    weight = mod.folded()[0] if hasattr(mod, "folded") else mod.weight
    observer = observer_for(mod) if fake is None else fake
    missing = [name for name in ("dtype", "qscheme", "quant_min", "quant_max") if not hasattr(observer, name)]
    if missing and getattr(observer, "dtype", None) != "float16":
        raise QConfigError(
            f"{type(observer).__name__} has no {', '.join(missing)}: a weight needs an observer of ranges, such as "
            f"MinMaxObserver, or one of dtype float16"
        )
    observer(weight.detach())
    return observer


def observer_for(mod: nn.Module) -> Any:
    """A new observer for weights of ``mod``, where they are, by its qconfig; int8 with a scale per row if that says
    nothing."""
    qconfig: Any = getattr(mod, "qconfig", None)
    if qconfig is None:
        raise QConfigError(f"{type(mod).__name__} has no qconfig")
    weight = next(mod.parameters(), None)
    # a default device of torch may be another one, without memory
    with nullcontext() if weight is None else weight.device:
        if qconfig.weight is None:
            observer: Any = PerChannelMinMaxObserver(dtype="qint8", qscheme="per_channel_symmetric")
        else:
            observer = qconfig.weight()
    return observer if weight is None else observer.to(weight.device)


class Precomputed:
    """The scale that a fake quantization holds."""

    def __init__(self, fake: Any) -> None:
        # one that was never used has no scale, and says so
        fake.calculate_qparams()
        self.dtype, self.qscheme, self.ch_axis = fake.dtype, fake.qscheme, fake.ch_axis
        self.quant_min, self.quant_max = fake.quant_min, fake.quant_max
        self.calculate_qparams = lambda: (fake.scale.detach(), fake.zero_point)


class StoredWeights(KeepsNamed):
    """A module that holds weights quantized, as plain Parameters without gradient.

    The weight ``weight`` is held as ``weight_packed``, ``weight_scale`` and, if it has a zero point, ``weight_zero``;
    in float16 as ``weight_half``. A reference module holds ``weight_float`` and rounds it in each forward pass.
    """

    is_reference = False
    # float dtype of weights when they are read
    weight_dtype: torch.dtype = torch.float32

    def hold(self, name: str, weight: torch.Tensor, observer: Any) -> None:
        """Quantize a float weight with the scale of an observer that has seen it, and hold it.

        Raises:
            QConfigError: weights are not stored in the dtype of the observer.
        """
        held = self.__dict__.setdefault("held", {})
        weight, self.weight_dtype = weight.detach(), weight.dtype
        if observer.dtype == "float16":
            held[name] = Held("float16", tuple(weight.shape))
            self.keep(f"{name}_half", weight.half(), parameter=True)
            return
        if observer.dtype not in CODES:
            raise QConfigError(f"weights are not stored as {observer.dtype}; choose one of float16, {', '.join(CODES)}")
        axis = scale_axis(observer, weight.dim(), 0)
        rows = weight.float().movedim(axis, 0).flatten(1)
        codes, scale, zero = encoded(rows, observer)
        low, high = int(observer.quant_min), int(observer.quant_max)
        held[name] = Held(observer.dtype, tuple(weight.shape), axis, low, high, zero.is_floating_point())
        if self.is_reference:
            self.keep(f"{name}_float", weight.clone(), parameter=True)
        else:
            self.keep(f"{name}_packed", codes, parameter=True)
        self.keep(f"{name}_scale", scale.clone(), parameter=True)
        # by the scheme and not by the values: the names in the state dict do not depend on the weight
        if not is_symmetric_int8(observer):
            self.keep(f"{name}_zero", zero.float(), parameter=True)

    def how(self, name: str) -> Held:
        """How a weight is held."""
        held: Held = self.__dict__["held"][name]
        return held

    def stored_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The stored tensors of a weight, by their short names."""
        found = {part: self._parameters.get(f"{name}_{part}") for part in ("packed", "scale", "zero", "half", "float")}
        return {part: tensor for part, tensor in found.items() if tensor is not None}

    def weight_of(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A weight as a float tensor.

        Args:
            name: of the weight.
            dtype: float dtype; None is that of the float module.
        """
        how, tensors = self.how(name), self.stored_tensors(name)
        dtype = dtype or self.weight_dtype
        if "half" in tensors:
            return tensors["half"].to(dtype)
        if "float" in tensors:
            return self._rounded(how, tensors).to(dtype)
        moved = _moved(how.shape, how.axis)
        columns = moved[1:].numel()
        if how.dtype == "quint4x2":
            rows = INT4.dequantize(tensors, columns, dtype)
        elif "zero" in tensors:
            rows = ((tensors["packed"].float() - tensors["zero"]) * tensors["scale"]).to(dtype)
        else:
            rows = INT8.dequantize(tensors, columns, dtype)
        return rows.view(moved).movedim(0, how.axis)

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights that are held, as float tensors, by name."""
        return {name: self.weight_of(name) for name in self.__dict__.get("held", {})}

    def rows_of(self, name: str, index: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows of a weight of 2 dimensions as float tensors, shape (*index.shape, columns)."""
        how, tensors = self.how(name), self.stored_tensors(name)
        dtype = dtype or self.weight_dtype
        if how.axis != 0 or "packed" not in tensors:
            return F.embedding(index, self.weight_of(name, dtype))
        if how.dtype == "quint4x2":
            return INT4.rows(tensors, index, how.shape[1], dtype)
        codes, scale = tensors["packed"][index].float(), tensors["scale"][index]
        if "zero" in tensors:
            codes = codes - tensors["zero"][index]
        return (codes * scale).to(dtype)

    @staticmethod
    def _rounded(how: Held, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        scale = tensors["scale"].flatten()
        zero = tensors["zero"].flatten() if "zero" in tensors else torch.zeros_like(scale)
        zero = zero if how.float_zero else zero.to(torch.int32)
        return round_to_grid(tensors["float"], scale, zero, how.quant_min, how.quant_max, how.axis)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        probe = fn(torch.empty(0, dtype=self.weight_dtype, device="cpu"))
        if probe.is_floating_point():
            self.weight_dtype = probe.dtype
        return self

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of nn.Module; refuses a float weight where a quantized one is held, which nothing would read."""
        if name in self.__dict__.get("held", {}):
            refuse_write(self, f"{name} = nn.Parameter(...)")
        super().register_parameter(name, param)

    def weights_repr(self) -> str:
        """The stored weights in a few words."""
        kinds = sorted({how.dtype for how in self.__dict__.get("held", {}).values()})
        return f"weights={'/'.join(kinds)}" + (", reference" if self.is_reference else "")


class StoredWeight(StoredWeights):
    """Mixin of modules with one such weight. The other base is the float module type, or has it."""

    @property
    def weight(self) -> torch.Tensor:
        """The weight as a float tensor."""
        return self.weight_of("weight")

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        refuse_write(self, "weight = ...")

    def extra_repr(self) -> str:
        """As of the float module, the grid if there is one, and the weights."""
        return f"{super().extra_repr()}, {self.weights_repr()}"


def as_reference(cls: type[Any]) -> type[Any]:
    """The class whose modules keep the float weight, round it in each forward pass, and give the numbers of ``cls``.

    Args:
        cls: a class that has ``is_reference``.
    """
    if cls not in _REFERENCES:
        text = f"A {cls.__name__} that keeps its float weight."
        _REFERENCES[cls] = type(f"Reference{cls.__name__}", (cls,), {"is_reference": True, "__doc__": text})
    return _REFERENCES[cls]


def scale_axis(observer: Any, dims: int, default: int) -> int:
    """The dimension of a weight that has scales."""
    return observer.ch_axis % dims if getattr(observer, "qscheme", "").startswith("per_channel") else default


def is_symmetric_int8(observer: Any) -> bool:
    """Whether weights of this observer are int8 without a zero point, as in the scheme int8."""
    return observer.dtype in ("qint8", "int8") and observer.qscheme.endswith("symmetric")


def encoded(rows: torch.Tensor, observer: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed codes, scale and zero point of rows of a float32 weight; the latter two have one entry for each row. One
    scale for the whole weight is the same scale for each row."""
    scale, zero = (
        value.detach().reshape(-1, 1).expand(rows.shape[0], 1).contiguous() for value in observer.calculate_qparams()
    )
    steps = rows / scale
    codes = (steps + zero).round() if zero.is_floating_point() else steps.round() + zero
    codes = codes.clamp(int(observer.quant_min), int(observer.quant_max)).to(CODES[observer.dtype])
    return pack(codes, 4) if observer.dtype == "quint4x2" else codes, scale, zero


def _moved(shape: tuple[int, ...], axis: int) -> torch.Size:
    return torch.Size((shape[axis], *shape[:axis], *shape[axis + 1 :]))
