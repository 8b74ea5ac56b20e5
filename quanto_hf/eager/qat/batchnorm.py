"""Modules whose batch norm is folded into the rounded weight while both are trained.

The weight that is rounded is the one that will be stored: w * gamma / sqrt(running variance + eps). The product is
divided by the same factor again, and goes through the batch norm, whose statistics are so those of the float module
(Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference: a whitepaper", 2018,
https://arxiv.org/abs/1806.08342).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from quanto_hf.eager.modules.kept import WithReLU
from quanto_hf.eager.qat.weighted import RoundedWeight


class WithBatchNorm(RoundedWeight):
    """Mixin: a convolution or linear layer and its batch norm ``bn``."""

    bn: Any
    # whether the statistics of the batch norm are those of training, and stay
    freeze_bn = False

    def adopt(self, mod: Any) -> None:
        """Take the batch norm of a fused module, its second child."""
        self.bn = mod[1]

    def adopted(self) -> list[nn.Module]:
        """The batch norm."""
        return [self.bn]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The product with the rounded weight, the batch norm, and the fused ReLU."""
        bn, weight, bias = self.bn, self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        factor = bn.weight / torch.sqrt(bn.running_var + bn.eps)
        # a channel that the batch norm multiplies with 0 is rounded as it is
        factor = torch.where(factor == 0, torch.ones_like(factor), factor)
        rounded = self.weight_fake_quant(weight * factor.view(-1, *[1] * (weight.dim() - 1)))
        out = self.product(input, rounded.to(input.dtype))
        each = (1, -1, *[1] * (out.dim() - 2))
        out = out / factor.view(each).to(out.dtype)
        if bias is not None:
            out = out + bias.view(each).to(out.dtype)
        return self.finish(bn(out))

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The product without a bias."""
        out: torch.Tensor = self._conv_forward(x, weight, None)  # type: ignore[operator]
        return out

    def folded(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias with the batch norm folded in."""
        bn = self.bn
        fold: Any = fuse_linear_bn_weights if isinstance(self, nn.Linear) else fuse_conv_bn_weights
        mine = (self._parameters["weight"], self._parameters["bias"])
        weight, bias = fold(*mine, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
        return weight, bias

    def train(self, mode: bool = True) -> Any:
        """As of nn.Module; frozen statistics stay frozen."""
        super().train(mode)
        if self.freeze_bn:
            self.bn.train(False)
        return self

    def freeze_bn_stats(self) -> Any:
        """Use the statistics that the batch norm has, from now on."""
        self.freeze_bn = True
        self.bn.train(False)
        return self

    def update_bn_stats(self) -> Any:
        """Use the statistics of each batch, and keep their average."""
        self.freeze_bn = False
        self.bn.train(True)
        return self


class ConvBn1d(WithBatchNorm, nn.Conv1d):
    """``nn.Conv1d`` and ``nn.BatchNorm1d``."""


class ConvBn2d(WithBatchNorm, nn.Conv2d):
    """``nn.Conv2d`` and ``nn.BatchNorm2d``."""


class ConvBn3d(WithBatchNorm, nn.Conv3d):
    """``nn.Conv3d`` and ``nn.BatchNorm3d``."""


class ConvBnReLU1d(WithReLU, ConvBn1d):
    """``nn.Conv1d``, ``nn.BatchNorm1d`` and ReLU."""


class ConvBnReLU2d(WithReLU, ConvBn2d):
    """``nn.Conv2d``, ``nn.BatchNorm2d`` and ReLU."""


class ConvBnReLU3d(WithReLU, ConvBn3d):
    """``nn.Conv3d``, ``nn.BatchNorm3d`` and ReLU."""


class LinearBn1d(WithBatchNorm, nn.Linear):
    """``nn.Linear`` and ``nn.BatchNorm1d``."""

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The product without a bias."""
        return F.linear(x, weight)


def freeze_bn_stats(mod: nn.Module) -> None:
    """For ``model.apply``: let batch norms that are folded use the statistics that they have."""
    if isinstance(mod, WithBatchNorm):
        mod.freeze_bn_stats()


def update_bn_stats(mod: nn.Module) -> None:
    """For ``model.apply``: let batch norms that are folded use those of each batch."""
    if isinstance(mod, WithBatchNorm):
        mod.update_bn_stats()
