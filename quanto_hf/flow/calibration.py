"""Calibration: static scales of activations, from data that passes through the model."""

import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn

from quanto_hf.flow.batches import batches, count_of, device_of, run_all
from quanto_hf.nn import QuantizedInput
from quanto_hf.nn.observers import Observer, observer_by_name
from quanto_hf.qtypes import QType

# what makes an observer for a number type
MakeObserver = Callable[[QType], Observer]


class Calibration:
    """While it is entered, every quantized layer that rounds its input notes the range of what passes instead; when it
    is left, the layers have static scales.

    Any way to run the model counts: forward, ``generate``, several batches. Layers see inputs that no layer before them
    has rounded. A model that was calibrated before starts anew. If an error leaves the block, nothing is changed.

    Args:
        model: quantized with ``activations``, frozen or not, on any device.
        observer: how a scale is found from what passed: "moving_average" (of the smallest and largest value of each
            call), "minmax" (over all calls), "percentile" (cuts outliers off), "mse" (least squared error), or a
            function that makes a :class:`quanto_hf.nn.observers.Observer` for a number type.
        momentum: of the moving average: the part of the old value that stays.
        percentile: for "percentile": percent of the values that are not cut off at each end.

    Raises:
        ValueError: an argument is not allowed, or no layer of the model rounds its input.

    Warns:
        UserWarning: layers that no data reached; they refuse to run until they are calibrated.

    Example:
        >>> from quanto_hf.flow import freeze, quantize
        >>> model = freeze(quantize(nn.Sequential(nn.Linear(16, 4)), "int8", activations="int8"))
        >>> with Calibration(model):
        ...     _ = model(torch.linspace(-1.27, 1.27, 16))
        >>> round(model[0].input_scale.item(), 4)
        0.01
    """

    def __init__(
        self,
        model: nn.Module,
        observer: str | MakeObserver = "moving_average",
        *,
        momentum: float = 0.9,
        percentile: float = 99.99,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"Calibration takes the model first: Calibration(model), not {type(model).__name__}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum!r} is not in 0 <= momentum < 1")
        self.model = model
        self.layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, QuantizedInput) and module.activations is not None
        }
        if not self.layers:
            raise ValueError(
                "no layer of this model rounds its input, so there is nothing to calibrate; quantize it with "
                "activations='int8' or 'float8'"
            )
        self._make = _maker(observer, momentum, percentile) if isinstance(observer, str) else observer

    def __enter__(self) -> "Calibration":
        kinds = {name: module.activations for name, module in self.layers.items()}
        # all of them first: a function of the user may raise
        observers = {name: self._make(kind) for name, kind in kinds.items() if kind is not None}
        for name, observer in observers.items():
            self.layers[name].start_observing(observer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        observers = {name: module.stop_observing() for name, module in self.layers.items()}
        if kind is not None:
            return
        # all of them before the first layer is changed: one may have seen what is no number
        found = {name: _scale(name, o) if self.layers[name].observed else None for name, o in observers.items()}
        for name, scale in found.items():
            module = self.layers[name]
            module.make_static(scale, None if scale is not None else device_of(module))
        unseen = [name for name, scale in found.items() if scale is None]
        if unseen:
            more = f" and {len(unseen) - 3} more" if len(unseen) > 3 else ""
            warnings.warn(
                f"no data reached {len(unseen)} of {len(found)} layers to calibrate: {', '.join(unseen[:3])}{more}; "
                f"they refuse to run until some does",
                stacklevel=2,
            )


def calibrate(
    model: nn.Module,
    data: Any,
    observer: str | MakeObserver = "moving_average",
    *,
    momentum: float = 0.9,
    percentile: float = 99.99,
    progress: bool = True,
) -> nn.Module:
    """Run a model over data, without gradients and in evaluation mode, and give its layers static scales.

    Args:
        model: quantized with ``activations``.
        data: one batch (a dict of keyword arguments, a tuple of positional ones, or a tensor), or a list or DataLoader
            of batches. Tensors are moved to the device of the model.
        observer: see :class:`Calibration`.
        momentum: see :class:`Calibration`.
        percentile: see :class:`Calibration`.
        progress: show a bar with the time left on stderr.

    Returns:
        The model itself, in the mode in which it was.

    Raises:
        ValueError: there is no batch, or as of :class:`Calibration`.
    """
    from tqdm import tqdm

    with Calibration(model, observer, momentum=momentum, percentile=percentile):
        run_all(model, tqdm(batches(data), desc="calibrating", total=count_of(data), disable=not progress))
    return model


def _maker(name: str, momentum: float, percentile: float) -> MakeObserver:
    cls: Any = observer_by_name(name)
    extra: dict[str, Any] = {}
    if name == "moving_average":
        extra["averaging_constant"] = 1 - momentum
    if name == "percentile":
        extra["percentile"] = percentile

    def make(kind: QType) -> Observer:
        dtype = kind.name if kind.float_dtype is not None else "qint8"
        low, high = (None, None) if kind.float_dtype is not None else (int(kind.qmin), int(kind.qmax))
        # it goes where the inputs are, and could not leave a default device without memory
        with torch.device("cpu"):
            made: Observer = cls(dtype=dtype, qscheme="per_tensor_symmetric", quant_min=low, quant_max=high, **extra)
        return made

    # wrong arguments are told before anything is changed
    make(QType("int8", 8, "int", -127, 127))
    return make


def _scale(name: str, observer: nn.Module | None) -> torch.Tensor:
    """The scale that an observer has found.

    Raises:
        ValueError: it has seen values that are not numbers.
    """
    assert isinstance(observer, Observer)
    try:
        scale = observer.calculate_qparams()[0]
    except RuntimeError as reason:
        raise ValueError(f"{name}: {reason}") from None
    if scale.numel() != 1:
        raise ValueError(f"{name}: {type(observer).__name__} finds {scale.numel()} scales, and an input has one")
    return scale
