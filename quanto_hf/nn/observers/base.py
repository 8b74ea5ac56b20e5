"""What an observer is, the registry of observers, and how a range becomes a scale and a zero point."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from quanto_hf.nn.observers.factory import WithArgs
from quanto_hf.nn.observers.keeping import KeepsDtypes
from quanto_hf.nn.observers.number_types import Number, dtype_name, number, scheme_name

OBSERVERS: dict[str, type["Observer"]] = {}
EPS = torch.finfo(torch.float32).eps

T = TypeVar("T", bound=type["Observer"])


def register(name: str) -> Callable[[T], T]:
    """Class decorator: make the observer known by a name."""

    def named(cls: T) -> T:
        OBSERVERS[name] = cls
        return cls

    return named


def observer_by_name(name: str) -> type["Observer"]:
    """The observer class of a name.

    Raises:
        ValueError: there is none.

    Example:
        >>> observer_by_name("histogram").__name__
        'HistogramObserver'
    """
    if name not in OBSERVERS:
        raise ValueError(f"observer={name!r} is not known; choose one of {', '.join(sorted(OBSERVERS))}")
    return OBSERVERS[name]


class Observer(WithArgs, KeepsDtypes):
    """Lets a tensor pass and may remember something of it.

    Args:
        dtype: number type that the tensor is to be quantized to; kept by its name.
        is_dynamic: the scale will be found anew for each tensor.
    """

    def __init__(self, dtype: Any, is_dynamic: bool = False) -> None:
        super().__init__()
        self.dtype, self.is_dynamic = dtype_name(dtype), is_dynamic

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Record ``x`` and return it."""
        return x

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point.

        Raises:
            RuntimeError: they cannot be known.
        """
        raise RuntimeError(f"{type(self).__name__} records no range, so it has no scale and no zero point")

    def reset(self) -> None:
        """Forget what was seen."""


class RangeObserver(Observer):
    """An observer that maps a range of values to codes.

    Args:
        dtype: number type: a torch dtype or a name; "quint8", "qint8", "uint8", "int8", "quint4x2", "int16", "int32",
            "float8_e4m3fn" ...
        qscheme: "per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric" or
            "per_channel_affine_float_qparams" (the zero point is a float), or the torch object of that name.
        reduce_range: use half of the codes.
        quant_min: smallest code; None, with ``quant_max``, is that of the dtype.
        quant_max: largest code.
        eps: smallest scale.
        is_dynamic: the scale will be found anew for each tensor.
        factory_kwargs: device and dtype of the buffers; float32 whatever torch's default dtype is.

    Raises:
        ValueError: the values do not go together.
    """

    eps: torch.Tensor
    # the range that was seen
    min_val: torch.Tensor
    max_val: torch.Tensor
    schemes: tuple[str, ...] = ("per_tensor_affine", "per_tensor_symmetric")

    def __init__(
        self,
        dtype: Any = "quint8",
        qscheme: Any = "per_tensor_affine",
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = EPS,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__(dtype, is_dynamic)
        self.qscheme = scheme_name(qscheme)
        if self.qscheme not in self.schemes:
            raise ValueError(
                f"{type(self).__name__} does not work for {self.qscheme}; choose {', '.join(self.schemes)}"
            )
        kind = number(dtype)
        self.reduce_range = reduce_range
        self.has_customized_qrange = quant_min is not None and quant_max is not None
        self.quant_min, self.quant_max = code_range(kind, quant_min, quant_max, reduce_range)
        if self.qscheme.endswith("symmetric") and reduce_range and kind.name == "quint8":
            raise ValueError("reduce_range does not work for symmetric quint8, whose zero point is 128; choose qint8")
        made = factory_kwargs or {}
        eps_dtype = made.get("dtype") or torch.float32
        self.register_buffer("eps", torch.tensor([eps], dtype=eps_dtype, device=made.get("device")))

    @property
    def is_symmetric(self) -> bool:
        """Whether 0 is the middle of the range."""
        return self.qscheme.endswith("symmetric")

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of what was seen.

        Returns:
            float32 scale and int32 zero point (float32 for float qparams), shape (1,), or (channels,) of an observer of
            channels.

        Raises:
            RuntimeError: nothing was observed, or values that are NaN or infinite.
        """
        return self.qparams_of(self.min_val, self.max_val)

    def qparams_of(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of the range from ``low`` to ``high``, one for each of their elements.

        Returns:
            float32 scale and int32 zero point (float32 for float qparams), at least of one dimension.

        Raises:
            RuntimeError: nothing was observed, or values that are not numbers.
        """
        self._check_seen(low, high)
        low, high = low.float().reshape(-1), high.float().reshape(-1)
        steps = float(self.quant_max - self.quant_min)
        if self.qscheme == "per_channel_affine_float_qparams":
            scale = (high - low) / steps
            scale = torch.where(scale > self.eps, scale, torch.ones_like(scale))
            return scale, -low / scale
        # 0 is always in the range, so that padding and ReLU are exact
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.is_symmetric:
            scale = torch.maximum(torch.maximum(-low, high) / (steps / 2), self.eps)
            return scale, torch.full_like(scale, self._middle(), dtype=torch.int32)
        scale = torch.maximum((high - low) / steps, self.eps)
        zero = self.quant_min - torch.round(low / scale).to(torch.int32)
        return scale, zero.clamp(self.quant_min, self.quant_max)

    def _middle(self) -> int:
        kind = number(self.dtype)
        if kind.name in ("quint8", "uint8") and self.has_customized_qrange:
            return (self.quant_min + self.quant_max) // 2
        return kind.middle

    def _check_seen(self, low: torch.Tensor, high: torch.Tensor) -> None:
        # the values of tensors on meta cannot be looked at
        if low.device.type == "meta":
            return
        if low.numel() == 0 or bool((low > high).any()):
            raise RuntimeError(
                f"this {type(self).__name__} has seen no values: run the prepared model on some data before you convert"
                f" it, or ask for dynamic quantization, which needs none"
            )
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise RuntimeError(f"this {type(self).__name__} has seen values that are NaN or infinite: look at the data")

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *args: Any
    ) -> None:
        """As of nn.Module; the range of channels takes the shape of the one that is loaded."""
        for name, buffer in self._buffers.items():
            given = state_dict.get(prefix + name)
            if buffer is not None and isinstance(given, torch.Tensor) and given.shape != buffer.shape:
                self._buffers[name] = buffer.new_zeros(given.shape)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *args)

    def reset_min_max_vals(self) -> None:
        """The name of :meth:`reset` in torch."""
        self.reset()

    def extra_repr(self) -> str:
        """Type, scheme and codes."""
        return f"dtype={self.dtype}, qscheme={self.qscheme}, codes={self.quant_min}..{self.quant_max}"


def code_range(kind: Number, low: int | None, high: int | None, reduce_range: bool) -> tuple[int, int]:
    """Smallest and largest code.

    Raises:
        ValueError: only one of them was given, or they are not a range around 0 that the type can hold.
    """
    if (low is None) != (high is None):
        raise ValueError(f"quant_min={low} and quant_max={high} are given together or not at all")
    if low is None or high is None:
        low, high = kind.low, kind.high
    elif not low <= 0 <= high or low == high:
        raise ValueError(f"quant_min={low} and quant_max={high} are not a range with 0 in it")
    elif high - low > kind.high - kind.low:
        raise ValueError(f"{kind.name} has {kind.high - kind.low + 1} codes, fewer than from {low} to {high}")
    # floor division, so that -128..127 becomes -64..63
    return (low // 2, high // 2) if reduce_range else (low, high)


def is_memoryless(observer: Any) -> bool:
    """Whether only the last tensor counts, as in dynamic quantization."""
    observer = getattr(observer, "activation_post_process", observer)
    return bool(getattr(observer, "memoryless", False)) or getattr(observer, "averaging_constant", None) == 1
