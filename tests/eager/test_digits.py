"""A conv net on the handwritten digits of scikit-learn: what static quantization and training with it cost."""

import pytest
import torch
from torch import nn

from quanto_hf import eager
from quanto_hf.eager import (
    DeQuantStub,
    FakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    QConfig,
    QuantStub,
    fuse_modules,
    fuse_modules_qat,
    get_default_qat_qconfig,
    get_default_qconfig,
    quantize,
    quantize_qat,
)

datasets = pytest.importorskip("sklearn.datasets")
FUSIBLE = [["conv1", "bn1", "relu1"], ["conv2", "bn2", "relu2"], ["fc1", "relu3"]]


class Digits(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()
        self.fc1, self.relu3, self.fc2 = nn.Linear(16 * 16, 32), nn.ReLU(), nn.Linear(32, 10)

    def forward(self, x):
        x = self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(self.quant(x)))))))
        return self.dequant(self.fc2(self.relu3(self.fc1(x.flatten(1)))))


@pytest.fixture(scope="module")
def data():
    """Images and labels: 1000 to train on, 797 to test with."""
    found = datasets.load_digits()
    x = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1000], y[:1000], x[1000:], y[1000:]


def fit(model, x, y, epochs, lr=0.01):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    draw = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=draw).split(100):
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model, x, y):
    """In percent."""
    return (model.eval()(x).argmax(1) == y).float().mean().item() * 100


@pytest.fixture(scope="module")
def trained(data):
    torch.manual_seed(0)
    model = Digits().train()
    fit(model, *data[:2], epochs=6)
    assert accuracy(model, *data[2:]) > 96
    return model.eval()


@pytest.mark.parametrize("backend", ["x86", "fbgemm", "onednn", "qnnpack"])
def test_static_int8_is_within_half_a_point(trained, data, backend):
    x, _, *test = data
    model = fuse_modules(trained, FUSIBLE)
    model.qconfig = get_default_qconfig(backend)
    made = quantize(model, lambda model, x: model(x), [x[:300]])
    assert accuracy(made, *test) >= accuracy(trained, *test) - 0.5


def test_training_with_quantization_is_within_half_a_point(trained, data):
    x, y, *test = data
    model = Digits()
    model.load_state_dict(trained.state_dict())
    model = fuse_modules_qat(model.train(), FUSIBLE)
    model.qconfig = get_default_qat_qconfig()
    made = quantize_qat(model, fit, [x, y, 1, 1e-3])
    assert accuracy(made, *test) >= accuracy(trained, *test) - 0.5


def test_training_brings_back_what_three_levels_lose(trained, data):
    x, y, *test = data
    few = {"quant_min": -1, "quant_max": 1, "dtype": "qint8", "qscheme": "per_channel_symmetric"}
    activation = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
    weight = FakeQuantize.with_args(observer=MovingAveragePerChannelMinMaxObserver, **few)

    def three_levels(epochs):
        model = Digits()
        model.load_state_dict(trained.state_dict())
        model = fuse_modules_qat(model.train(), FUSIBLE)
        model.qconfig = QConfig(activation, weight)
        return accuracy(quantize_qat(model, train, [epochs]), *test)

    def train(model, epochs):
        if epochs:
            fit(model, x, y, epochs, 2e-3)
        else:
            model.apply(eager.freeze_bn_stats)
            model(x[:300])

    float_accuracy, before, after = accuracy(trained, *test), three_levels(0), three_levels(4)
    assert before < float_accuracy - 3
    assert float_accuracy - after < (float_accuracy - before) / 2
