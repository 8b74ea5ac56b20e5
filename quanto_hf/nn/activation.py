"""Quantization of activations: rounding with scales that are found when a token passes, or that were calibrated."""

from typing import Any, ClassVar

import torch
from torch import nn

from quanto_hf.nn.bound_call import BoundCall
from quanto_hf.ops import TOKEN, round_activations, scale_gradient
from quanto_hf.ops.watched import faked, sizes, traced, untraced
from quanto_hf.qtypes import QType

INPUT_SCALE = "input_scale"
INPUT_OBSERVER = "input_observer"


def fake_quantize_input(
    x: torch.Tensor, qtype: QType, group: int = TOKEN, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Round activations to the numbers that ``qtype`` can hold.

    The numbers are exactly those of a quantized product; memory and speed are those of the float one. The gradient
    passes straight through. With a scale, none reaches what lies outside of its range, and the scale itself gets the
    gradient of learned step sizes (Esser et al., "Learned Step Size Quantization", 2020,
    https://arxiv.org/abs/1902.08153) if it wants one.

    Args:
        x: float, shape (..., features).
        qtype: int8 or an 8-bit float.
        group: columns that share a scale found here, absmax over the largest number; -1 for a token. What a weight asks
            for is in :func:`quanto_hf.ops.activation_group`.
        scale: None, or the one scale of the whole tensor, as calibration finds it; 1 element.

    Returns:
        The shape and dtype of ``x``.
    """
    with torch.no_grad():
        # detached, which a trace records; that there are no gradients here it does not
        rounded = round_activations(x.detach(), qtype, group, None if scale is None else scale.detach())
        quantized = rounded.to(x.dtype)
    wanted = torch.is_grad_enabled() and (x.requires_grad or (scale is not None and scale.requires_grad))
    if not wanted and not traced():
        return quantized
    if scale is None:
        # the difference is exactly 0: the result is the same number with and without a gradient
        return quantized + (x - x.detach())
    # inside of the range d/dx is 1 and d/dscale is the rounding error in steps; outside d/dscale is the last number
    step = scale_gradient(scale, 1 / (max(torch.Size(sizes(x)).numel(), 1) * qtype.qmax) ** 0.5)
    # as they are written down: derivatives of a division overflow where a scale is next to 0
    with torch.no_grad():
        # of rounding, a scale of 0 counts as 1
        used = torch.where(scale == 0, torch.ones_like(scale), scale)
        steps, number = x.float() / used, rounded / used
        inside = (steps >= qtype.qmin) & (steps <= qtype.qmax)
        by_step = torch.where(inside, number - steps, number)
    surrogate = x.float().where(inside, torch.zeros_like(rounded)) + step * by_step
    return quantized + (surrogate - surrogate.detach()).to(x.dtype)


def check_calibrated(scale: torch.Tensor | None) -> None:
    """Raise RuntimeError for a static scale that was never calibrated."""
    if not is_calibrated(scale):
        raise RuntimeError(
            "this layer rounds its input with a static scale, and was never calibrated. Run some real data through "
            "the model first: with quanto_hf.Calibration(model): model(**batch)"
        )


def is_calibrated(scale: torch.Tensor | None) -> bool:
    """Whether there is nothing to calibrate, or it has been done."""
    with untraced():
        return scale is None or scale.device.type == "meta" or bool(torch.isfinite(scale).all())


class QuantizedInput(nn.Module):
    """Mixin of modules that round their input.

    ``activations`` is the number type, or None. Dynamic, a module holds nothing for it. Static, it holds the buffer
    ``input_scale``, float32 of shape (1,), which is NaN until it is calibrated; one that is trained is a Parameter. (A
    buffer, because accelerate's offload leaves it where the layer runs, and a Parameter that it does not know is an
    error there.)
    """

    activations: QType | None
    # whether its inputs can be rounded: those of an embedding are row numbers
    rounds_inputs: ClassVar[bool] = True
    # whether anything has passed since the module observes
    observed: bool = False
    # the scale that was found to be calibrated, and its version then: looking at it costs a wait for a GPU
    _checked: tuple[torch.Tensor, int] | None = None
    # a bound call, which must not outlive a change of how inputs are rounded
    _bound: BoundCall | None

    def _take_activations(self, activations: QType | None, static: bool) -> None:
        """Round inputs to ``activations`` from now on, where they can be rounded."""
        self.activations = activations if self.rounds_inputs else None
        if static and self.rounds_inputs:
            self.make_static()

    @property
    def static_scale(self) -> torch.Tensor | None:
        """The scale of inputs that is held, or None."""
        held = self._buffers.get(INPUT_SCALE)
        return held if held is not None else self._parameters.get(INPUT_SCALE)

    @property
    def is_static(self) -> bool:
        """Whether inputs are rounded with a scale that is held."""
        return self.static_scale is not None

    @property
    def is_calibrated(self) -> bool:
        """Whether there is nothing to calibrate, or it has been done."""
        return is_calibrated(self.static_scale)

    def make_static(self, scale: torch.Tensor | float | None = None, device: torch.device | str | None = None) -> None:
        """Round inputs with this scale from now on; None is one that calibration is to find.

        Raises:
            ValueError: the scale is not one positive number.
        """
        if device is None:
            # a number has no device of its own, and the default device need not be that of the module
            device = scale.device if isinstance(scale, torch.Tensor) else self._device()
        if scale is None:
            value = torch.full((1,), torch.nan, dtype=torch.float32, device=device)
        else:
            value = torch.as_tensor(scale, dtype=torch.float32, device=device).detach().reshape(-1).clone()
            if value.numel() != 1 or (value.device.type != "meta" and not bool(torch.isfinite(value) & (value > 0))):
                raise ValueError(f"the scale of an input is one positive number, not {scale}")
        self._hold_scale(value, self.trains_input_scale or self.learns)

    def make_dynamic(self) -> None:
        """Let go of the scale: from now on one is found for each token."""
        self._parameters.pop(INPUT_SCALE, None)
        self._buffers.pop(INPUT_SCALE, None)
        self._bound = None

    def train_input_scale(self, train: bool) -> None:
        """Make a static scale a Parameter, or the buffer again that it was."""
        scale = self.static_scale
        if scale is not None and train != self.trains_input_scale:
            # the sign of a trained scale means nothing
            self._hold_scale(scale.detach() if train else scale.detach().abs(), train)

    @property
    def learns(self) -> bool:
        """Whether scales are trained; a module with a weight knows."""
        return False

    @property
    def trains_input_scale(self) -> bool:
        """Whether a static scale of the input is a Parameter."""
        return INPUT_SCALE in self._parameters

    def _hold_scale(self, scale: torch.Tensor, train: bool) -> None:
        held = self._parameters.get(INPUT_SCALE)
        if train and held is not None and held.device == scale.device:
            # an optimizer may know it already
            with torch.no_grad():
                held.copy_(scale)
            return
        self.make_dynamic()
        if train:
            self._parameters[INPUT_SCALE] = nn.Parameter(scale)
        else:
            self.register_buffer(INPUT_SCALE, scale)

    def _check_calibrated(self) -> None:
        scale = self.static_scale
        # a graph cannot look at the value; there an uncalibrated model gives NaN
        if scale is None or torch.compiler.is_compiling() or faked():
            return
        # one that was made in inference mode has no version
        version = 0 if scale.is_inference() else scale._version
        if self._checked is not None and self._checked[0] is scale and self._checked[1] == version:
            return
        check_calibrated(scale)
        self._checked = (scale, version)

    def start_observing(self, observer: nn.Module) -> None:
        """Note the range of inputs from now on, and let them through as they are."""
        self._modules[INPUT_OBSERVER] = observer
        self.observed = False
        self._bound = None

    def stop_observing(self) -> nn.Module | None:
        """Let go of the observer, and return it."""
        self._bound = None
        return self._modules.pop(INPUT_OBSERVER, None)

    def _device(self) -> torch.device | None:
        return next((p.device for p in self._parameters.values() if p is not None), None)

    @property
    def is_observing(self) -> bool:
        """Whether inputs are noted, and not rounded."""
        return INPUT_OBSERVER in self._modules

    def _observe(self, x: torch.Tensor) -> bool:
        observer = self._modules.get(INPUT_OBSERVER)
        if observer is None:
            return False
        held = next(observer.buffers(), None)
        if held is not None and held.device != x.device:
            observer.to(x.device)
        observer(x.detach())
        self.observed = self.observed or x.numel() > 0
        return True

    def _describe_input(self) -> str:
        """The part of ``extra_repr`` that is about the input."""
        if self.activations is None:
            return ""
        static = " static" if self.is_static else ""
        return f", activations={self.activations}{static}{'' if self.is_calibrated else ', not calibrated'}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *args: Any
    ) -> None:
        """As of nn.Module. A scale in the state dict of a dynamic module is one that was calibrated."""
        given = state_dict.get(prefix + INPUT_SCALE)
        if self.activations is not None and not self.is_static and isinstance(given, torch.Tensor):
            self.make_static(device=self._device())
        self._bound = None
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *args)
