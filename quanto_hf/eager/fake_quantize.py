"""Fake quantization: rounds a tensor in the forward pass, as if it were quantized, and lets gradients through."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from quanto_hf.eager.grid import round_to_grid, round_with_learned_scale
from quanto_hf.nn.observers import (
    FixedQParamsObserver,
    KeepsDtypes,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    WithArgs,
)

__all__ = [
    "FakeQuantize",
    "FixedQParamsFakeQuantize",
    "FusedMovingAvgObsFakeQuantize",
    "disable_fake_quant",
    "disable_observer",
    "enable_fake_quant",
    "enable_observer",
]


class FakeQuantize(WithArgs, KeepsDtypes):
    """Observes a tensor, and rounds it to the grid that the observer has found.

    Gradients pass straight through where the tensor is on the range of the grid (Bengio et al., "Estimating or
    propagating gradients through stochastic neurons for conditional computation", 2013).

    Args:
        observer: constructor of an observer with a range.
        quant_min: smallest code; None, with ``quant_max``, is that of the observer's dtype.
        quant_max: largest code.
        is_dynamic: the scale is found anew for each tensor; needs an observer without memory.
        learnable: the scale is a parameter. It starts as the observer's for the first tensor, after which observing
            ends; see :func:`quanto_hf.eager.grid.round_with_learned_scale`.
        observer_kwargs: all other arguments of the observer.

    Example:
        >>> fake = FakeQuantize(dtype="qint8", qscheme="per_tensor_symmetric")
        >>> fake(torch.tensor([0.0, 0.004, 1.0])).tolist()
        [0.0, 0.00784..., 0.9960...]
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    fake_quant_enabled: torch.Tensor
    observer_enabled: torch.Tensor

    def __init__(
        self,
        observer: Callable[..., nn.Module] = MovingAverageMinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        is_dynamic: bool = False,
        learnable: bool = False,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__()
        if quant_min is not None or quant_max is not None:
            observer_kwargs.update(quant_min=quant_min, quant_max=quant_max)
        # it may be any class that has what the observers here have
        found: Any = observer(is_dynamic=is_dynamic, **observer_kwargs)
        self.activation_post_process = found
        if getattr(found, "quant_min", None) is None:
            raise ValueError(f"{type(found).__name__} has no range; fake quantization needs an observer that has one")
        self.quant_min: int = found.quant_min
        self.quant_max: int = found.quant_max
        self.dtype: str = found.dtype
        self.qscheme: str = found.qscheme
        self.is_dynamic: bool = found.is_dynamic
        self.is_per_channel = self.qscheme.startswith("per_channel")
        self.ch_axis = getattr(found, "ch_axis", -1)
        self.learnable = learnable
        # whether there is a scale to round with
        self._ready = False
        device = next((buffer.device for buffer in found.buffers()), None)
        for flag in ("fake_quant_enabled", "observer_enabled"):
            self.register_buffer(flag, torch.ones(1, dtype=torch.uint8, device=device))
        scale = torch.ones(1, device=device, dtype=torch.float32)
        if learnable:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        zero = torch.float32 if self.qscheme.endswith("float_qparams") else torch.int32
        self.register_buffer("zero_point", torch.zeros(1, dtype=zero, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Observe ``x`` if that is enabled; ``x`` rounded if that is enabled, else ``x``."""
        if x.numel() and bool(self.observer_enabled):
            self.activation_post_process(x.detach())
            self.take_qparams()
            if self.learnable:
                self.disable_observer()
        if not bool(self.fake_quant_enabled) or not x.numel():
            return x
        if not self._ready:
            # an observer that was disabled before it has seen anything is an error, and no scale of 1
            self.activation_post_process.calculate_qparams()
            self._ready = True
        how = round_with_learned_scale if self.learnable else round_to_grid
        axis = self.ch_axis if self.is_per_channel else None
        return how(x, self.scale, self.zero_point, self.quant_min, self.quant_max, axis, self.dtype)

    def take_qparams(self) -> None:
        """Hold the scale and zero point that the observer has found."""
        for name, value in zip(("scale", "zero_point"), self.activation_post_process.calculate_qparams(), strict=True):
            held = getattr(self, name)
            if held.shape != value.shape:
                held.data = torch.empty_like(value, dtype=held.dtype)
            held.data.copy_(value)

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point: learned ones, or those of the observer.

        Raises:
            RuntimeError: the observer has seen nothing.
        """
        found: tuple[torch.Tensor, torch.Tensor] = self.activation_post_process.calculate_qparams()
        return (self.scale.detach(), self.zero_point) if self.learnable else found

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Round, or do not."""
        self.fake_quant_enabled.fill_(int(enabled))

    def disable_fake_quant(self) -> None:
        """Do not round."""
        self.enable_fake_quant(False)

    def enable_observer(self, enabled: bool = True) -> None:
        """Observe, or keep the scale as it is."""
        self.observer_enabled.fill_(int(enabled))

    def disable_observer(self) -> None:
        """Keep the scale as it is."""
        self.enable_observer(False)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *args: Any
    ) -> None:
        """As of nn.Module; scales of channels take the shape of those that are loaded."""
        for name in ("scale", "zero_point"):
            given, held = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(given, torch.Tensor) and given.shape != held.shape:
                held.data = held.new_zeros(given.shape)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *args)

    def extra_repr(self) -> str:
        """Type, scheme and codes."""
        text = f"dtype={self.dtype}, qscheme={self.qscheme}, codes={self.quant_min}..{self.quant_max}"
        return f"{text}, learnable" if self.learnable else text


class FusedMovingAvgObsFakeQuantize(FakeQuantize):
    """Fake quantization with a moving average, by the name and with the defaults that torch gives the fused op."""

    def __init__(
        self,
        observer: Callable[..., nn.Module] = MovingAverageMinMaxObserver,
        quant_min: int = 0,
        quant_max: int = 255,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__(observer, quant_min, quant_max, **observer_kwargs)
        allowed = (MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver)
        if not isinstance(self.activation_post_process, allowed):
            raise ValueError(
                f"{type(self).__name__} works with a moving average, not with "
                f"{type(self.activation_post_process).__name__}; use FakeQuantize"
            )


class FixedQParamsFakeQuantize(FakeQuantize):
    """Fake quantization with a scale that is known beforehand.

    Args:
        observer: constructor of a :class:`FixedQParamsObserver`.
    """

    def __init__(self, observer: Callable[..., nn.Module], **observer_kwargs: Any) -> None:
        super().__init__(observer, **observer_kwargs)
        if not isinstance(self.activation_post_process, FixedQParamsObserver):
            raise ValueError(f"{type(self).__name__} works with a FixedQParamsObserver only")
        self.take_qparams()


def _switch(method: str, text: str) -> Callable[[nn.Module], None]:
    def switch(module: nn.Module) -> None:
        if isinstance(module, FakeQuantize):
            getattr(module, method)()

    switch.__name__ = switch.__qualname__ = method
    switch.__doc__ = f"{text} For ``model.apply``; other modules are left alone."
    return switch


enable_fake_quant = _switch("enable_fake_quant", "Round.")
disable_fake_quant = _switch("disable_fake_quant", "Do not round.")
enable_observer = _switch("enable_observer", "Observe.")
disable_observer = _switch("disable_observer", "Keep the scale as it is.")
