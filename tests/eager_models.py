"""Small models in which each step of the eager mode has something to do, for quanto_hf.eager or for torch's own."""

import torch
from torch import nn


class ConvNet(nn.Module):
    """Convolutions with batch norms and ReLU, a residual, and a linear layer, between stubs.

    Args:
        mode: ``quanto_hf.eager``, or ``torch.ao.quantization``.
        functional: its FloatFunctional.
    """

    fusible = (("conv", "bn", "relu"), ("conv2", "bn2"))

    def __init__(self, mode, functional=None):
        super().__init__()
        self.quant, self.dequant = mode.QuantStub(), mode.DeQuantStub()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.skip = (functional or mode.FloatFunctional)()
        self.fc = nn.Linear(8 * 36, 10)

    def forward(self, x):
        x = self.relu(self.bn(self.conv(self.quant(x))))
        x = self.skip.add_relu(x, self.bn2(self.conv2(x)))
        return self.dequant(self.fc(x.flatten(1)))


def images(count=16):
    return torch.randn(count, 3, 6, 6)


def run(model, *batches):
    """A calibration."""
    with torch.no_grad():
        for x in batches:
            model(x)


def twin(model, mode, functional=None):
    """The same ConvNet in the other mode."""
    other = ConvNet(mode, functional)
    other.load_state_dict(model.state_dict())
    return other.train(model.training)


def error(made, exact):
    """Relative error of a tensor."""
    return ((made - exact).norm() / exact.norm()).item()


def warmed(model):
    """A model whose batch norms have statistics, in eval mode."""
    with torch.no_grad():
        for _ in range(5):
            model.train()(images() * 2 + 1)
    return model.eval()
