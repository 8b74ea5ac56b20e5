"""A layer norm whose output is quantized. Only wanted where activations are."""

import torch
from torch import nn

from quanto_hf.nn.activation import fake_quantize
from quanto_hf.nn.registry import register_qmodule
from quanto_hf.qtypes import QType


@register_qmodule(nn.LayerNorm)
class QLayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` with its output rounded per token to ``activations``. Weight and bias stay float."""

    activations: QType | None = None

    @classmethod
    def from_module(cls, module: nn.LayerNorm, activations: QType | None) -> "QLayerNorm":
        """A layer that shares weight and bias with ``module``."""
        with torch.device("meta"):
            layer = cls(module.normalized_shape, module.eps, module.elementwise_affine, module.bias is not None)
        layer.weight, layer.bias = module.weight, module.bias
        layer.activations = activations
        return layer.train(module.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise, then round."""
        out = super().forward(input)
        return out if self.activations is None else fake_quantize(out, self.activations)

    def extra_repr(self) -> str:
        """As of nn.LayerNorm, and the number type of the output."""
        return f"{super().extra_repr()}, activations={self.activations}"
