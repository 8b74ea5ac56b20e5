"""Modules that log what passes, for the numeric suite."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from quanto_hf.flow.batches import device_of, mapped, moved

# methods of FloatFunctional, which is called by them
FUNCTIONS = ("add", "add_scalar", "mul", "mul_scalar", "cat", "add_relu", "matmul")


class Logger(nn.Module):
    """Base class: ``stats`` is a dictionary of lists."""

    def __init__(self) -> None:
        super().__init__()
        self.stats: dict[str, Any] = {}
        self.handle: RemovableHandle | None = None

    def record(self, module: nn.Module, args: Any, output: Any) -> None:
        """The forward hook of the module that is logged."""
        self(output)

    def remove(self) -> None:
        """Stop logging."""
        if self.handle is not None:
            self.handle.remove()


class OutputLogger(Logger):
    """Logs the outputs of one module: ``stats["tensor_val"]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stats["tensor_val"] = []

    def forward(self, x: Any) -> Any:
        """Log a copy; returns what came."""
        self.stats["tensor_val"].append(_copy(x))
        return x


class ShadowLogger(Logger):
    """Logs the outputs of a module and of its shadow: ``stats["quantized"]`` and ``stats["float"]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stats["float"] = []
        self.stats["quantized"] = []

    def forward(self, x: Any, y: Any) -> None:
        """Log copies; of several outputs, as of an LSTM, the first."""
        for name, value in (("quantized", x), ("float", y)):
            self.stats[name].append(_copy(value[0] if isinstance(value, tuple | list) else value))


class Shadow(nn.Module):
    """A quantized module, and its float one that is run on the same input. The output is that of the quantized module.

    Args:
        q_module: the quantized module.
        float_module: its float module.
        logger_cls: makes the logger, which is called with both outputs.
    """

    def __init__(self, q_module: nn.Module, float_module: nn.Module, logger_cls: Callable[[], Logger]) -> None:
        super().__init__()
        self.orig_module = q_module
        self.shadow_module = float_module
        self.logger = logger_cls()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run both."""
        return self._both("__call__", args, kwargs)

    def _both(self, method: str, args: Any, kwargs: Any) -> Any:
        # copied first: the quantized module may be one that works in place
        given = moved(_copy((args, kwargs)), device_of(self.shadow_module))
        output = getattr(self.orig_module, method)(*args, **kwargs)
        self.logger(output, getattr(self.shadow_module, method)(*given[0], **given[1]))
        return output

    def __getattr__(self, name: str) -> Any:
        """The methods of FloatFunctional run both as well; anything else is asked of the quantized module."""
        if name in FUNCTIONS:
            return lambda *args, **kwargs: self._both(name, args, kwargs)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("orig_module"), name)


def _copy(value: Any) -> Any:
    """The same with copied float tensors."""

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.dequantize() if tensor.is_quantized else tensor.detach().clone()

    return mapped(value, copied)
