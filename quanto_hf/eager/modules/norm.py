"""Norms whose output is on the grid of an observer. Their weights stay float."""

import torch
from torch import nn

from quanto_hf.eager.modules.kept import WithReLU
from quanto_hf.eager.modules.on_grid import OnGrid


class Norm(OnGrid):
    """What all norms share."""

    # a ReLU that is fused, before the output is rounded
    relu = False

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> "Norm":
        """The norm with the tensors of ``mod`` and the grid of its observer.

        Args:
            mod: a norm, or a fused one whose first child is one.
            use_precomputed_fake_quant: has a meaning for weights only.
        """
        inner = mod[0] if isinstance(mod, nn.Sequential) else mod
        if inner is not mod:
            inner.activation_post_process = mod.activation_post_process
        new = super().from_float(inner)
        assert isinstance(new, Norm)
        return new

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The norm, the fused ReLU, and the rounding of the output."""
        out = super().forward(input)
        return self.on_grid(out.relu() if self.relu else out)


class BatchNorm2d(Norm, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with a rounded output."""


class BatchNorm3d(Norm, nn.BatchNorm3d):
    """``nn.BatchNorm3d`` with a rounded output."""


class BNReLU2d(WithReLU, BatchNorm2d):
    """A batch norm and a ReLU, of which only the output of the second is rounded."""


class BNReLU3d(WithReLU, BatchNorm3d):
    """A batch norm and a ReLU, of which only the output of the second is rounded."""


class LayerNorm(Norm, nn.LayerNorm):
    """``nn.LayerNorm`` with a rounded output."""


class GroupNorm(Norm, nn.GroupNorm):
    """``nn.GroupNorm`` with a rounded output."""


class InstanceNorm1d(Norm, nn.InstanceNorm1d):
    """``nn.InstanceNorm1d`` with a rounded output."""


class InstanceNorm2d(Norm, nn.InstanceNorm2d):
    """``nn.InstanceNorm2d`` with a rounded output."""


class InstanceNorm3d(Norm, nn.InstanceNorm3d):
    """``nn.InstanceNorm3d`` with a rounded output."""
