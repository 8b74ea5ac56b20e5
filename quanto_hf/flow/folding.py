"""Scaling the channels between a module and the linear layers that read it, and taking it back."""

import torch
from torch import nn

from quanto_hf.flow.channels import Flow


class NotExact(Exception):
    """The channels of a module cannot be scaled; the text says why."""


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference up to which results are equal: a rounding of half floats, and in float32 some more."""
    return max(torch.finfo(dtype).eps, 1e-5)


class Folding:
    """The output channels of a source divided by a scale, and the input channels of its readers multiplied by it.

    Args:
        flow: the source.
        layers: all linear layers that read it.
        scale: float32, shape (channels,).
    """

    def __init__(self, flow: Flow, layers: list[nn.Linear], scale: torch.Tensor) -> None:
        self.flow, self.layers, self.scale = flow, layers, scale
        # what to do to each tensor that has been changed to get it back
        self._undo: list[tuple[torch.Tensor, torch.Tensor, bool]] = []

    def apply(self) -> None:
        """Change the parameters, in place.

        Raises:
            NotExact: they cannot be; nothing is changed then.
        """
        try:
            if isinstance(self.flow.module, nn.Linear):
                self._multiply(self.flow.module.weight, 1 / self.scale[:, None])
                if self.flow.module.bias is not None:
                    self._multiply(self.flow.module.bias, 1 / self.scale)
            else:
                self._scale_norm(self.flow.module)
            for layer in self.layers:
                self._multiply(layer.weight, self.scale)
        except NotExact:
            self.undo()
            raise

    def undo(self) -> None:
        """Take everything back."""
        for parameter, factor, is_backup in reversed(self._undo):
            parameter.copy_(factor if is_backup else parameter / factor)
        self._undo.clear()

    def done(self) -> None:
        """Let go of what :meth:`undo` would need."""
        self._undo.clear()

    def _multiply(self, parameter: torch.Tensor, factor: torch.Tensor) -> None:
        # a factor that is no power of two keeps its digits in a half-float weight
        wide = torch.promote_types(parameter.dtype, torch.float32)
        factor = factor.to(parameter.device, wide)
        scaled = (parameter * factor).to(parameter.dtype)
        if not scaled.isfinite().all():
            raise NotExact(f"a weight would leave the range of {str(parameter.dtype).removeprefix('torch.')}")
        # a power of two changes the exponent alone, but for numbers that become too small for it: nothing to keep
        exact = torch.equal((scaled / factor).to(parameter.dtype), parameter)
        self._undo.append((parameter, factor, False) if exact else (parameter, parameter.clone(), True))
        parameter.copy_(scaled)

    def _scale_norm(self, norm: nn.Module) -> None:
        """Find out how the norm uses its weight, and scale it: what counts is what comes out."""
        weight, bias, sample = norm._parameters["weight"], norm._parameters.get("bias"), self.flow.sample
        assert weight is not None and sample is not None
        wanted = norm(sample)
        scale = self.scale.to(weight.device)
        # most norms multiply by w; those of Gemma by 1 + w
        for scaled in (weight / scale, (1 + weight.float()) / scale - 1):
            held = weight.clone()
            self._undo.append((weight, held, True))
            weight.copy_(scaled)
            if bias is not None:
                self._multiply(bias, 1 / scale)
            if _equal(norm(sample).float() * self.scale.to(wanted.device), wanted):
                return
            self.undo()
        raise NotExact(f"the output of a {type(norm).__name__} does not scale exactly with its weight")


def _equal(made: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether every channel is equal."""
    error = (made - wanted.float()).abs().flatten(0, -2)
    size = wanted.float().abs().flatten(0, -2)
    if not error.numel():
        return True
    return bool((error.amax(0) <= tolerance(wanted.dtype) * size.amax(0)).all())
