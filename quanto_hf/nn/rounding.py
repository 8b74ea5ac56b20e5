"""How the numbers of a PREPARED layer are rounded: a value, and functions of it over tensors. Layers and operators of
torch compute by the same one."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from quanto_hf.fit import NO_CONTEXT, Context, Fit
from quanto_hf.nn.activation import INPUT_SCALE, check_calibrated, fake_quantize_input
from quanto_hf.nn.slots import WEIGHT
from quanto_hf.qtypes import QType
from quanto_hf.schemes import Scheme

SCALE, ZERO = "learned_scale", "learned_zero"
SMALLEST = torch.finfo(torch.bfloat16).tiny

Maybe = torch.Tensor | None


def usable(scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The scale that a learned one stands for: not 0, and positive unless the scheme has signed ones, whatever value a
    step of the optimizer gave it. A limit at 0 would have no gradient that leads back, so a positive one is the
    magnitude."""
    if not scheme.signed_scales:
        return scale.abs().clamp(min=SMALLEST)
    # its gradient is that of the scale as it is, on its way through 0 too
    with torch.no_grad():
        away = torch.full_like(scale, SMALLEST).copysign(scale)
        short = torch.where(scale.abs() < SMALLEST, away - scale, torch.zeros_like(scale))
    return scale + short


class Rounding(NamedTuple):
    """How weight and input are rounded. ``sources`` below are the tensors that may have a gradient, by name:
    ``weight`` as a matrix, ``learned_scale`` and ``learned_zero`` of it, ``input_scale``.

    Args:
        scheme: how the weight is stored.
        fit: what finds scales that are not learned; None is the default of the scheme.
        activations: number type to which inputs are rounded, or None.
    """

    scheme: Scheme
    fit: Fit | str | None = None
    activations: QType | None = None

    def stored(self, sources: Mapping[str, torch.Tensor], context: Context = NO_CONTEXT) -> dict[str, torch.Tensor]:
        """The stored tensors of the weight.

        Args:
            context: what the fit may use: moments, a seed.
        """
        matrix, scale = sources[WEIGHT].detach(), sources.get(SCALE)
        if scale is None:
            return self.scheme.quantize(matrix, self.fit, context)
        return self.scheme.encode(matrix, usable(scale, self.scheme), sources.get(ZERO))

    def round_weight(self, sources: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The float weight with the numbers of the packed one; gradients pass straight through the rounding."""
        matrix, scale = sources[WEIGHT], sources.get(SCALE)
        if scale is not None:
            return self.scheme.fake_quantize(matrix, usable(scale, self.scheme), sources.get(ZERO)).to(matrix.dtype)
        with torch.no_grad():
            rounded = self.scheme.dequantize(self.scheme.quantize(matrix, self.fit), matrix.shape[1], matrix.dtype)
        # the difference is exactly 0: the result is the same number with and without a gradient
        return rounded + (matrix - matrix.detach()) if matrix.requires_grad else rounded

    def round_input(self, x: torch.Tensor, scale: Maybe) -> torch.Tensor:
        """x as it is multiplied.

        Args:
            scale: the static one, or None.
        """
        if self.activations is None:
            return x
        return fake_quantize_input(x, self.activations, self.scheme.activation_group(self.activations), scale)

    def multiply(
        self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor], bias: Maybe, scale: Maybe = None
    ) -> torch.Tensor:
        """The product with a packed weight: one kernel that rounds x as well, or one step after the other. Without
        gradients.

        Args:
            tensors: the stored tensors.
            scale: the static one of x, or None.
        """
        if self.activations is None:
            return self.scheme.linear(x, tensors, bias)
        return self.scheme.linear_rounded(x, tensors, bias, self.activations, scale)

    def product(self, x: torch.Tensor, sources: Mapping[str, torch.Tensor], bias: Maybe) -> torch.Tensor:
        """The product with the rounded weight, without gradients.

        Raises:
            RuntimeError: the static scale of the input was never calibrated.
        """
        scale = sources.get(INPUT_SCALE)
        if self.activations is not None:
            check_calibrated(scale)
        return self.multiply(x, self.stored(sources), bias, scale)
