"""Gradients of roundings."""

import torch


def scale_gradient(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """The same values, with the gradient multiplied by ``factor``. The gradient of a step size grows with the number of
    values that share it; Esser et al., 2020, https://arxiv.org/abs/1902.08153, section 2.2, divides by its root."""
    scaled = tensor * factor
    return (tensor - scaled).detach() + scaled
