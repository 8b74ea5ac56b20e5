"""Named tensors of a module that keep their dtype when the module is converted to another one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class KeepsNamed(nn.Module):
    """A module some of whose tensors keep their dtype: codes, and scales.

    ``kept`` holds their names. All others are converted as usual.
    """

    def keep(self, name: str, tensor: torch.Tensor, parameter: bool = False) -> None:
        """Hold a tensor of a fixed dtype: as a parameter without gradient, or a buffer."""
        self.__dict__.setdefault("kept", set()).add(name)
        if parameter:
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        else:
            self.register_buffer(name, tensor)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        kept = {id(getattr(self, name)) for name in self.__dict__.get("kept", ())}

        def guarded(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if id(tensor) in kept and result.dtype != tensor.dtype else result

        return super()._apply(guarded, recurse)  # type: ignore[no-untyped-call]


class WithReLU:
    """Mixin of modules with a fused ReLU, which comes before the output is rounded."""

    relu = True


def as_parameter(tensor: torch.Tensor | None) -> nn.Parameter | None:
    """A Parameter as it is, another tensor as a new one, and None."""
    return tensor if tensor is None or isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach())


def settings_of(module: nn.Module) -> dict[str, Any]:
    """What a module was made with: everything but its tensors, children, hooks and what quantization has added."""
    own = set(nn.Module().__dict__) | {"qconfig", "activation_post_process", "parametrizations"}
    # a tensor is a weight that the older weight_norm has computed
    return {k: value for k, value in vars(module).items() if k not in own and not isinstance(value, torch.Tensor)}


def bare(cls: Any, module: nn.Module) -> Any:
    """An object of ``cls`` with the settings of ``module``, and no tensors yet."""
    new = cls.__new__(cls)
    nn.Module.__init__(new)
    new.__dict__.update(settings_of(module))
    return new.train(module.training)
