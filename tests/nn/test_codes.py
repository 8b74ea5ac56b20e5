"""Arithmetic on codes: averages of equal codes are the codes, those of others an error; integers are torch's."""

import copy
import doctest
import importlib

import pytest
import torch
from torch import nn

import quanto_hf
from quanto_hf.nn.codes import Codes

DECAYS = (0.9, 0.98, 0.999, 0.9999)
WEIGHTS = ("int8", "int4", "nf4", "float8", "aqlm-1x4")
every_weight = pytest.mark.parametrize("weights", WEIGHTS)
every_decay = pytest.mark.parametrize("decay", DECAYS)


def network(weights: str, seed: int = 0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 40))
    return quanto_hf.freeze(quanto_hf.quantize(net, weights=weights)).requires_grad_(False)


def over_states(step):
    """A loop over two state dicts."""

    def loop(ema, net, decay):
        for mine, other in zip(ema.state_dict().values(), net.state_dict().values(), strict=True):
            step(mine, other, decay)

    return loop


def over_parameters(step):
    """A loop over the parameters of two models."""

    def loop(ema, net, decay):
        for mine, other in zip(ema.parameters(), net.parameters(), strict=True):
            step(mine, other, decay)

    return loop


def add(mine, other, decay):
    mine += (1 - decay) * (other - mine)


STEPS = {
    "copy": lambda mine, other, d: mine.copy_(d * mine + (1 - d) * other),
    "copy-right": lambda mine, other, d: mine.copy_(mine * d + other * (1 - d)),
    "copy-float": lambda mine, other, d: mine.copy_(mine.float() * d + other.float() * (1 - d)),
    "copy-alpha": lambda mine, other, d: mine.copy_(torch.add(mine * d, other, alpha=1 - d)),
    "lerp": lambda mine, other, d: mine.lerp_(other.to(mine.dtype), 1 - d),
    "sub": lambda mine, other, d: mine.sub_((1 - d) * (mine - other)),
    "add": add,
    "detach": lambda mine, other, d: mine.detach().copy_(mine.detach() * d + other.detach() * (1 - d)),
}
# of a parameter, float() is that of torch, and what is made an integer of it is truncated
STATES = {"copy-to": lambda mine, other, d: mine.copy_((mine.float() * d + other.float() * (1 - d)).to(mine.dtype))}
LOOPS = {f"state-{name}": over_states(step) for name, step in (STEPS | STATES).items()}
LOOPS |= {f"parameters-{name}": over_parameters(step) for name, step in STEPS.items()}


def integers(net):
    return [tensor.clone() for tensor in net.state_dict().values() if not tensor.is_floating_point()]


@every_weight
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_that_averages_equal_models_leaves_codes_alone(weights, name):
    # one decay for each combination, so that every loop meets all of them
    loop, decay = LOOPS[name], DECAYS[(list(LOOPS).index(name) + WEIGHTS.index(weights)) % len(DECAYS)]
    net = network(weights)
    ema, before = copy.deepcopy(net), integers(net)
    with torch.no_grad():
        for _ in range(20):
            loop(ema, net, decay)
    assert before and all(map(torch.equal, integers(ema), before)) and all(map(torch.equal, integers(net), before))


# state-copy-to makes integers of its average itself
@every_decay
@pytest.mark.parametrize("name", [name for name in LOOPS if name != "state-copy-to"])
def test_a_loop_that_averages_other_codes_is_an_error(decay, name):
    ema, net, loop = network("int4"), network("int4", seed=1), LOOPS[name]
    with torch.no_grad(), pytest.raises(ValueError, match="codes of packed weights that differ have no average"):
        for _ in range(20):
            loop(ema, net, decay)


def test_a_state_dict_of_averages_of_other_codes_is_refused():
    net, other = network("int4"), network("int4", seed=1)
    first, second = net.state_dict(), other.state_dict()
    before = integers(net)
    averages = {name: (first[name] + second[name]) / 2 for name in first}
    with pytest.raises(RuntimeError, match=r"dtype mismatch for 0\.weight_packed.*torch\.float64"):
        net.load_state_dict(averages)
    assert all(map(torch.equal, integers(net), before))


@pytest.mark.parametrize("data", [True, False])
def test_codes_put_behind_a_parameter_are_averages_of_equal_ones(data):
    net, other = network("int8"), network("int8", seed=1)
    mine, before = net[0].weight_packed, integers(net)
    mine.data = mine.data * 0.9 + mine.data * (1 - 0.9)
    assert all(map(torch.equal, integers(net), before))
    with pytest.raises(ValueError, match="codes of packed weights that differ have no average"):
        mine.data = mine.data * 0.9 + other[0].weight_packed.data * (1 - 0.9)


def test_codes_cannot_be_scaled_in_place():
    net = network("int4")
    before = integers(net)
    with torch.no_grad():
        for codes in (net[0].weight_packed, net.state_dict()["0.weight_packed"]):
            with pytest.raises(ValueError, match=r"cannot be scaled in place.*copy_ or lerp_"):
                codes.mul_(0.9)
            with pytest.raises(ValueError, match="cannot be scaled in place"):
                codes *= 0.5
    assert all(map(torch.equal, integers(net), before))


def test_integer_arithmetic_is_that_of_torch():
    plain = torch.arange(8, dtype=torch.uint8)
    codes = plain.clone().as_subclass(Codes)
    for function in (
        lambda x: x + 1,
        lambda x: x * 3,
        lambda x: x >> 1,
        lambda x: x & 3,
        lambda x: x // 2,
        lambda x: -x,
    ):
        made = function(codes)
        assert type(made) is torch.Tensor and torch.equal(made, function(plain)) and made.dtype == function(plain).dtype
    # taking codes apart by hand: what is not whole is truncated as ever
    assert torch.equal((codes.float() / 2).to(torch.uint8), (plain.float() / 2).to(torch.uint8))
    out = torch.empty(8)
    torch.add(codes, 0.5, out=out)
    assert torch.equal(out, plain + 0.5)
    codes.add_(1)
    assert torch.equal(codes, plain + 1)


def test_the_docs_of_this_module():
    assert doctest.testmod(importlib.import_module("quanto_hf.nn.codes")).failed == 0
