"""A convolutional net with residual blocks, trained on the digits of scikit-learn: what int8 costs it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quanto_hf.flow import calibrate, freeze, quantize
from quanto_hf.nn import QConv2d

datasets = pytest.importorskip("sklearn.datasets")


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


@pytest.fixture(scope="module")
def digits():
    """Images to train with and their labels, and images to test with and their labels."""
    data = datasets.load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    images = (torch.tensor(data.images, dtype=torch.float32)[:, None] / 16)[order]
    labels = torch.tensor(data.target)[order]
    return images[:1000], labels[:1000], images[1000:], labels[1000:]


@pytest.fixture(scope="module")
def net(digits):
    images, labels, *_ = digits
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            Block(8, 16, 2), Block(16, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(5):
            for batch in torch.randperm(len(images)).split(50):
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model, digits):
    """Percent of the images to test with."""
    *_, images, labels = digits
    return 100 * (model(images).argmax(1) == labels).float().mean().item()


def test_the_net_has_learned(net, digits):
    assert accuracy(net, digits) > 93


@pytest.mark.parametrize("observer", ["moving_average", "minmax", "percentile", "histogram", "mse"])
def test_static_int8_costs_at_most_half_a_point_of_accuracy(net, digits, observer):
    model = freeze(quantize(copy.deepcopy(net), "int8", activations="int8", static_activations=True))
    calibrate(model, list(digits[0][:200].split(50)), observer, progress=False)
    assert sum(isinstance(module, QConv2d) and module.is_static for module in model.modules()) == 7
    assert accuracy(model, digits) >= accuracy(net, digits) - 0.5


@pytest.mark.parametrize("activations", ["int8", "float8"])
def test_a_scale_per_image_costs_at_most_half_a_point_of_accuracy(net, digits, activations):
    model = freeze(quantize(copy.deepcopy(net), "int8", activations=activations))
    assert accuracy(model, digits) >= accuracy(net, digits) - 0.5


def test_activations_that_are_cut_off_cost_accuracy(net, digits):
    # what the bound above is worth: a wrong scale is seen
    model = freeze(quantize(copy.deepcopy(net), "int8", activations="int8", static_activations=True))
    calibrate(model, [digits[0][:50] / 8], "minmax", progress=False)
    assert accuracy(model, digits) < accuracy(net, digits) - 0.5
