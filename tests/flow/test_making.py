"""Whole models to AQLM: with data and without, resumed after a kill, with a warning for layers that no data reached."""

import copy
import importlib
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from quanto_hf.flow import freeze, freeze_aqlm, quantize
from quanto_hf.io.safe_files import TEMPORARY


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.idle = nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


@pytest.fixture
def net():
    return quantize(Net(), "aqlm-2x4", exclude="idle")


@pytest.fixture
def data():
    mixture = torch.randn(32, 32) * torch.arange(1, 33) ** -0.7
    return [torch.randn(100, 32) @ mixture for _ in range(3)]


def error(exact, made, x):
    with torch.no_grad():
        return float((exact(x) - made(x)).norm() / exact(x).norm())


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_with_data_outputs_are_closer_than_without(net, data):
    exact = copy.deepcopy(net)
    for layer in (exact.a, exact.b, exact.c):
        layer.set_rounding(False)
    x = data.pop()
    free = freeze_aqlm(copy.deepcopy(net), progress=False)
    made = freeze_aqlm(copy.deepcopy(net), data, progress=False)
    assert error(exact, made, x) < 0.8 * error(exact, free, x)


def test_without_data_it_is_freeze(net):
    assert same(tensors(freeze(copy.deepcopy(net))), tensors(freeze_aqlm(net, progress=False)))


def test_layers_are_frozen_and_the_others_left_alone(net, data):
    assert freeze_aqlm(net, data, progress=False) is net
    assert net.a.is_frozen and net.c.is_frozen and type(net.idle) is nn.Linear
    assert net.a.weight_error is not None and net.training


def test_a_layer_that_no_data_reached_is_made_from_its_weight(data):
    model = quantize(Net(), "aqlm-2x3")
    free = freeze(copy.deepcopy(model))
    with pytest.warns(UserWarning, match="no data reached 1 layers: idle; they are made from their weights alone"):
        freeze_aqlm(model, data, progress=False)
    assert same(tensors(free.idle), tensors(model.idle))


@pytest.mark.parametrize("moment_bytes", [1, 10**9])
def test_what_is_interrupted_goes_on_to_the_same_bits(net, data, tmp_path, monkeypatch, moment_bytes):
    whole = tensors(freeze_aqlm(copy.deepcopy(net), data, progress=False, moment_bytes=moment_bytes))
    fits = importlib.import_module("quanto_hf.schemes.aqlm")
    right, made = fits.quantize_aqlm, []

    def dies(*args, **kwargs):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(args)
        return right(*args, **kwargs)

    first = copy.deepcopy(net)
    monkeypatch.setattr(fits, "quantize_aqlm", dies)
    with pytest.raises(KeyboardInterrupt):
        freeze_aqlm(first, data, folder=tmp_path, progress=False, moment_bytes=moment_bytes)
    assert len(list(tmp_path.iterdir())) == 2
    # what is not finished is as it was
    assert not first.c.is_frozen and first.c.rounding

    made.clear()
    monkeypatch.setattr(fits, "quantize_aqlm", lambda *a, **k: (made.append(a), right(*a, **k))[1])
    again = freeze_aqlm(copy.deepcopy(net), data, folder=tmp_path, progress=False, moment_bytes=moment_bytes)
    assert len(made) == 1 and same(tensors(again), whole)


KILLED = """
import os, signal, sys, torch
from torch import nn
from quanto_hf.flow import freeze_aqlm, quantize
from quanto_hf.io import safe_files

torch.manual_seed(0)
torch.set_num_threads(2)
model = quantize(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16), nn.Linear(16, 8)), "aqlm-1x3")
replace, count = os.replace, []

def kills(a, b):
    if len(count) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    count.append(replace(a, b))

safe_files.os.replace = kills
freeze_aqlm(model, [torch.ones(4, 16)], folder=sys.argv[1], progress=False)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_process_leaves_whole_files_and_the_next_one_goes_on(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    files = [path.name for path in tmp_path.iterdir()]
    assert sum(name.startswith(TEMPORARY) for name in files) == 1 and len(files) == 2
    torch.manual_seed(0)
    model = quantize(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16), nn.Linear(16, 8)), "aqlm-1x3")
    whole = freeze_aqlm(copy.deepcopy(model), [torch.ones(4, 16)], progress=False)
    before = next(path for path in tmp_path.iterdir() if not path.name.startswith(TEMPORARY)).stat().st_mtime_ns
    with warnings.catch_warnings():
        # what was left half made has another name
        warnings.simplefilter("error")
        resumed = freeze_aqlm(model, [torch.ones(4, 16)], folder=tmp_path, progress=False)
    assert same(tensors(resumed), tensors(whole))
    # the layer that was finished was not made again
    assert before in [path.stat().st_mtime_ns for path in tmp_path.iterdir()]


def test_finished_layers_of_other_data_are_made_again(net, data, tmp_path):
    freeze_aqlm(copy.deepcopy(net), data, folder=tmp_path, progress=False)
    with pytest.warns(UserWarning, match="made from another weight, other data or other settings"):
        made = freeze_aqlm(copy.deepcopy(net), data[:1], folder=tmp_path, progress=False)
    assert same(tensors(made), tensors(freeze_aqlm(net, data[:1], progress=False)))


def test_the_estimate_comes_first_and_the_bar_tells_the_time_left(net, data, capsys):
    freeze_aqlm(net, data)
    err = capsys.readouterr().err
    assert err.startswith("3 layers with 0.0 M weights to aqlm 2x4 g8: about ")
    assert "threads, and 1 MB of memory besides the model" in err
    assert "left" in err and "100%" in err


def test_mistakes_are_named(net, data):
    with pytest.raises(ValueError, match=r"quantize\(model, 'aqlm-2x8'\) comes first"):
        freeze_aqlm(Net(), data)
    with pytest.raises(ValueError, match="read only once"):
        freeze_aqlm(net, iter(data))
    with pytest.raises(ValueError, match="no batch"):
        freeze_aqlm(net, [], progress=False)
    with pytest.raises(ValueError, match="a: the second moment of the inputs has NaN"):
        freeze_aqlm(net, [torch.full((2, 32), torch.nan)], progress=False)
    assert not net.a.is_frozen and net.a.rounding


def test_freeze_with_data_makes_every_layer_and_is_freeze_aqlm_for_those_with_codebooks(data):
    model = quantize(Net(), "aqlm-2x4", overrides={"b": {"weights": "int4"}}, exclude="idle")
    other = freeze_aqlm(copy.deepcopy(model), data, progress=False)
    assert other.a.is_frozen and not other.b.is_frozen
    # b is rounded in one of them, and float in the other, while data passes: the first layer sees the same
    assert freeze(model, data, progress=False) is model and model.b.is_frozen
    assert same(tensors(model.a), tensors(other.a))
    assert same(tensors(model), tensors(freeze(model, data)))


def test_data_that_no_layer_wants_is_said(data, tmp_path):
    model = quantize(Net(), "int4")
    wanted = tensors(freeze(copy.deepcopy(model)))
    with pytest.warns(UserWarning, match="the data is not used"):
        made = freeze(copy.deepcopy(model), data, folder=tmp_path, progress=False)
    assert same(tensors(made), wanted) and len(list(tmp_path.iterdir())) == 4
    # from the folder
    assert same(tensors(freeze(model, folder=tmp_path, progress=False)), wanted)
