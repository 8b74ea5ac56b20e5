"""Float modules that are quantized as one: a convolution, batch norm, linear layer and ReLU that follow each other."""

from torch import nn


class FusedModule(nn.Sequential):
    """Modules in a row that are observed and quantized as one."""


class ConvReLU1d(FusedModule):
    """``nn.Conv1d`` and ``nn.ReLU``."""


class ConvReLU2d(FusedModule):
    """``nn.Conv2d`` and ``nn.ReLU``."""


class ConvReLU3d(FusedModule):
    """``nn.Conv3d`` and ``nn.ReLU``."""


class ConvBn1d(FusedModule):
    """``nn.Conv1d`` and ``nn.BatchNorm1d``, for training."""


class ConvBn2d(FusedModule):
    """``nn.Conv2d`` and ``nn.BatchNorm2d``, for training."""


class ConvBn3d(FusedModule):
    """``nn.Conv3d`` and ``nn.BatchNorm3d``, for training."""


class ConvBnReLU1d(FusedModule):
    """``nn.Conv1d``, ``nn.BatchNorm1d`` and ``nn.ReLU``, for training."""


class ConvBnReLU2d(FusedModule):
    """``nn.Conv2d``, ``nn.BatchNorm2d`` and ``nn.ReLU``, for training."""


class ConvBnReLU3d(FusedModule):
    """``nn.Conv3d``, ``nn.BatchNorm3d`` and ``nn.ReLU``, for training."""


class LinearReLU(FusedModule):
    """``nn.Linear`` and ``nn.ReLU``."""


class LinearBn1d(FusedModule):
    """``nn.Linear`` and ``nn.BatchNorm1d``, for training."""


class BNReLU2d(FusedModule):
    """``nn.BatchNorm2d`` and ``nn.ReLU``."""


class BNReLU3d(FusedModule):
    """``nn.BatchNorm3d`` and ``nn.ReLU``."""
