"""How many numbers are at the end of what a quantized layer can hold."""

import torch
from torch import nn

from quanto_hf.flow.errors import Errors, Share
from quanto_hf.nn.qweight import QuantizedWeight


def clipped(module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """Which values of its input a quantized layer cuts off; None if it does not round its input.

    A scale that is found for each token reaches its largest value: nothing is clipped. A static one clips what lies
    more than half a step beyond the last integer, or beyond the last 8-bit float.

    Returns:
        bool, the shape of ``x``.
    """
    kind = getattr(module, "activations", None)
    if kind is None or not getattr(module, "rounds", True):
        return None
    scale = getattr(module, "static_scale", None)
    if scale is None:
        return torch.zeros_like(x, dtype=torch.bool)
    beyond = 0.5 if kind.float_dtype is None else 0.0
    numbers = x.detach().float() / scale.detach().to(x.device)
    hit: torch.Tensor = (numbers > kind.qmax + beyond) | (numbers < kind.qmin - beyond)
    return hit


@torch.no_grad()
def weight_errors(module: nn.Module, source: nn.Module) -> tuple[float | None, float | None]:
    """(||Q - W|| / ||W||, share of codes at the ends of the range) of the weight of a quantized layer.

    A grid that is put over the smallest and largest weight of each group has these two at its ends, 3 % of 64 weights;
    a much larger share means that weights are clipped.

    Args:
        module: a quantized layer, frozen or not, or anything with a ``weight``.
        source: its float layer.
    """
    weight, made = getattr(source, "weight", None), getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not isinstance(made, torch.Tensor) or weight.shape != made.shape:
        return None, None
    if weight.device.type == "meta" or made.device.type == "meta":
        # offloaded: what was measured when it was quantized is known
        return getattr(module, "weight_error", None), None
    errors, share = Errors(), Share()
    if not isinstance(module, QuantizedWeight):
        errors.add(made, weight)
        return errors.relative, None
    columns, stored = module.matrix_shape[1], module.tensors() or module.quantized()
    ends = module.scheme.at_ends(stored, columns)
    if ends is not None:
        share.add(ends)
    errors.add(module.scheme.dequantize(stored, columns, torch.float32), module.to_matrix(weight.detach()))
    return errors.relative, share.value
