"""Recipe: add a fit that wants second moments, and chooses codes by them: GPTQ, in 30 lines.

Frantar and others, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022.
"""

import copy

import pytest
import torch
from recipes import journey
from torch import nn

from quanto_hf import freeze, quantize
from quanto_hf.fit import Fit, Mse, Rounded, register


class Gptq(Fit):
    """One column after another; those that come make up for the error of those before. Without data it is mse."""

    name = "gptq"
    wants_moments = True

    def __call__(self, values, grid, kind):
        return Mse()(values, grid, kind)

    def round_rows(self, rows, grid, kind, group_size, context):
        if context.moment is None:
            return None
        columns = rows.shape[1]
        size = group_size if group_size > 0 else columns
        hessian = context.moment.to(rows.device).double()
        hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
        upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float()
        left, codes = rows.clone(), torch.empty(rows.shape, dtype=grid.qtype.storage)
        scales, zeros = [], []
        for j in range(columns):
            if j % size == 0:
                scale, zero = self(left[:, j : j + size].contiguous(), grid, kind)
                scales, zeros = [*scales, scale], [*zeros, zero]
            offset = 0.0 if zero is None else zero
            u = left[:, j : j + 1] / scale + offset
            grid.encode(u.clone(), codes[:, j : j + 1])
            made = (grid.nearest_(u) - offset) * scale
            left[:, j:] -= (left[:, j : j + 1] - made) / upper[j, j] * upper[j, j:]
        return Rounded(codes, torch.cat(scales, 1), None if zeros[0] is None else torch.cat(zeros, 1))


def add():
    return register(Gptq)


@pytest.fixture(autouse=True)
def _gptq():
    with journey.added(add):
        yield


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.idle = nn.Linear(64, 96), nn.Linear(96, 32), nn.Conv1d(4, 4, 3)

    def forward(self, x):
        return self.b(self.a(x).relu())


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def data():
    mixture = torch.randn(64, 64) * torch.arange(1, 65) ** -0.7
    return [torch.randn(100, 64) @ mixture for _ in range(4)]


@pytest.mark.parametrize("weights", [{"weights": "int4"}, {"weights": "int2"}, {"weights": "nf4", "group_size": -1}])
def test_with_data_the_outputs_are_closer_than_without(data, weights):
    exact, held_out = Net(), data.pop()
    prepared = quantize(copy.deepcopy(exact), **weights, optimizer="gptq")
    free = freeze(copy.deepcopy(prepared))
    made = freeze(copy.deepcopy(prepared), data, progress=False)
    with torch.no_grad():
        wanted = exact(held_out)
        errors = [journey.relative(model(held_out), wanted) for model in (made, free)]
    assert made.a.is_frozen and made.b.is_frozen and made.idle.is_frozen
    assert errors[0] < 0.9 * errors[1]


def test_without_data_it_is_what_a_call_finds(data):
    model = quantize(Net(), "int4", optimizer="gptq")
    other = quantize(copy.deepcopy(model), "int4", optimizer="gptq")
    for layer in (other.a, other.b, other.idle):
        layer.fit = "mse"
    made, wanted = tensors(freeze(model)), tensors(freeze(other))
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)


def test_what_is_interrupted_goes_on_to_the_same_bits(data, tmp_path, monkeypatch):
    model = quantize(Net(), "int4", optimizer="gptq")
    whole = tensors(freeze(copy.deepcopy(model), data, progress=False))
    right, made = Gptq.round_rows, []

    def dies(*args):
        if made:
            raise KeyboardInterrupt
        made.append(args)
        return right(*args)

    monkeypatch.setattr(Gptq, "round_rows", dies)
    with pytest.raises(KeyboardInterrupt):
        freeze(copy.deepcopy(model), data, folder=tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(Gptq, "round_rows", right)
    again = tensors(freeze(model, data, folder=tmp_path, progress=False))
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_what_is_not_finite_is_named(data):
    model = quantize(Net(), "int4", optimizer="gptq")
    with torch.no_grad():
        model.b.weight[3, 5] = torch.inf
    with pytest.raises(ValueError, match="b: the weight has NaN or infinite values"):
        freeze(model, [torch.randn(9, 64)], progress=False)


def test_a_plain_model_is_quantized():
    journey.plain_model({"weights": "int4", "optimizer": "gptq"}, 0.1, 4.5)


def test_a_model_of_transformers_takes_the_whole_journey(tmp_path):
    journey.transformers_model("recipes.test_fit", {"weights": "int4", "fit": "gptq"}, tmp_path, "int4 g64 asym")
