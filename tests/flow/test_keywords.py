"""A layer that is called by the name of its input, ``layer(input=x)``, is seen and computes like any other."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from quanto_hf import eager
from quanto_hf.eager import numeric_suite as suite
from quanto_hf.flow import Calibration, collect_moments, compare, freeze, freeze_aqlm, quantize, smooth
from quanto_hf.nn import QMODULES, qmodule_for
from quanto_hf.qtypes import qint8
from quanto_hf.schemes import make_scheme


class Net(nn.Module):
    """Each layer is called by the name of its input, or by position."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.by_name = by_name
        self.norm, self.first, self.relu, self.last = nn.LayerNorm(32), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.norm, self.first, self.relu, self.last):
            x = layer(input=x) if self.by_name else layer(x)
        return x


X = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 9, 32)


def nets() -> list[Net]:
    torch.manual_seed(0)
    net = Net(True).eval()
    other = copy.deepcopy(net)
    other.by_name = False
    return [net, other]


def _calibrated(net: Net) -> Any:
    frozen = freeze(quantize(net, "int8", activations="int8"))
    with Calibration(frozen):
        frozen(X)
    return frozen(X)


def _eager(net: Net, name: str) -> Any:
    net.qconfig = getattr(eager, name)  # type: ignore[assignment]
    prepared = eager.prepare(net)
    prepared(X)
    observers = [m for m in prepared.modules() if isinstance(m, eager.MinMaxObserver | eager.PlaceholderObserver)]
    return [m.calculate_qparams() for m in observers if isinstance(m, eager.MinMaxObserver)], prepared(X)


def _aqlm(net: Net) -> Any:
    with pytest.warns(UserWarning, match="codebooks"):
        quantize(net, "aqlm-1x4", exclude="last")
    return freeze_aqlm(net, X, progress=False)(X)


def _numeric_suite(net: Net) -> Any:
    made = freeze(quantize(copy.deepcopy(net), "int8"))
    found = suite.compare_model_stub(net, made, {nn.Linear}, X)
    return [found[key][kind] for key in sorted(found) for kind in ("float", "quantized")]


USES: dict[str, Callable[[Net], Any]] = {
    "moments": lambda net: collect_moments(net, X),
    "calibration": _calibrated,
    "compare": lambda net: [
        (row.name, row.own.relative, row.accumulated.relative)
        for row in compare(net, freeze(quantize(copy.deepcopy(net), "int4")), X).rows
    ],
    "smooth": lambda net: (len(list(smooth(net, X))), net(X)),
    "aqlm with data": _aqlm,
    "observers": lambda net: _eager(net, "default_qconfig"),
    "observers of inputs": lambda net: _eager(net, "default_dynamic_qconfig"),
    "numeric suite": _numeric_suite,
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("use", USES)
def test_what_watches_layers_sees_an_input_that_is_given_by_name(use: str):
    named, placed = (USES[use](net) for net in nets())
    assert same(named, placed)


def test_a_norm_that_is_called_by_name_is_folded():
    named, placed = ([(fold.source, *fold.layers) for fold in smooth(net, X)] for net in nets())
    assert named == placed and ("norm", "first") in named


@pytest.mark.parametrize("state", ["frozen", "prepared"])
@pytest.mark.parametrize("kind", QMODULES, ids=lambda kind: kind.__name__)
def test_every_quantized_module_takes_its_input_by_name(kind: type[nn.Module], state: str):
    torch.manual_seed(0)
    if "Embedding" in kind.__name__:
        module, x = kind(20, 32), torch.tensor([[1, 4, 4]])
    elif issubclass(kind, nn.Linear):
        module, x = kind(32, 8), torch.randn(3, 32)
    else:
        module, x = kind(8, 16, 3), torch.randn(2, 8, *[6] * int(kind.__name__[-2]))
    for activations in (None, qint8):
        cls: Any = qmodule_for(module)
        layer = cls.from_module(module, make_scheme("int8"), activations)
        if state == "frozen":
            layer.freeze()
        assert torch.equal(layer(input=x), layer(x))


def test_a_transposed_convolution_of_the_eager_mode_takes_output_size_by_name():
    net, x = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2)).eval(), torch.randn(1, 4, 5, 5)
    for qconfig in (eager.default_qconfig, eager.float16_static_qconfig):
        net.qconfig = qconfig  # type: ignore[assignment]
        prepared = eager.prepare(net)
        prepared(x)
        layer = eager.convert(prepared)[0]
        assert torch.equal(layer(x, output_size=[12, 12]), layer(x, [12, 12]))
