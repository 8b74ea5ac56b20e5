"""Whatever in a model holds a module that is replaced holds the new one afterwards."""

import gc
import weakref
from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from quanto_hf import QLinear, dequantize, freeze, quantize
from quanto_hf.flow import Choice, assign

Pair = namedtuple("Pair", "layer other")


@dataclass(frozen=True)
class Frozen:
    layer: Any


class Slots:
    __slots__ = ("layer",)

    def __init__(self, layer):
        self.layer = layer


class Plain:
    def __init__(self, layer):
        self.layer = layer


class Unregistered(nn.Module):
    """A module that is no submodule of the model, and runs a layer that is one."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer


def cycle(layer):
    held = [layer]
    held.append(held)
    return held


def closure(layer):
    return lambda x: layer(x)


def default(layer):
    def run(x, layer=layer, *, other=layer):
        return layer(x) + 0 * other(x)

    return run


def nested(layer):
    return [{"a": (1, [layer])}]


# kind of holder -> how it is made of a layer, how the layer is run
HOLDERS = {
    "list": (lambda m: [m, nn.ReLU()], lambda h, x: h[0](x)),
    "tuple": (lambda m: (0, m), lambda h, x: h[1](x)),
    "dict": (lambda m: {"a": m}, lambda h, x: h["a"](x)),
    "ordered": (lambda m: OrderedDict(a=m), lambda h, x: h["a"](x)),
    "key": (lambda m: {0: 0, m: 1}, lambda h, x: list(h)[1](x)),
    "set": (lambda m: {m}, lambda h, x: next(iter(h))(x)),
    "frozenset": (lambda m: frozenset([m]), lambda h, x: next(iter(h))(x)),
    "deque": (lambda m: deque([m]), lambda h, x: h[0](x)),
    "named tuple": (lambda m: Pair(m, 1), lambda h, x: h.layer(x)),
    "partial": (lambda m: partial(m), lambda h, x: h(x)),
    "argument": (lambda m: partial(lambda m, x: m(x), m), lambda h, x: h(x)),
    "keyword": (lambda m: partial(lambda x, m: m(x), m=m), lambda h, x: h(x)),
    "method": (lambda m: m.forward, lambda h, x: h(x)),
    "call": (lambda m: m.__call__, lambda h, x: h(x)),
    "frozen dataclass": (Frozen, lambda h, x: h.layer(x)),
    "namespace": (lambda m: SimpleNamespace(layer=m), lambda h, x: h.layer(x)),
    "slots": (Slots, lambda h, x: h.layer(x)),
    "object": (Plain, lambda h, x: h.layer(x)),
    "module": (lambda m: [Unregistered(m)], lambda h, x: h[0].layer(x)),
    "weak reference": (weakref.ref, lambda h, x: h()(x)),
    "closure": (closure, lambda h, x: h(x)),
    "defaults": (default, lambda h, x: h(x)),
    "nested": (nested, lambda h, x: h[0]["a"][1][0](x)),
    "cycle": (cycle, lambda h, x: h[1][1][0](x)),
}


class Holding(nn.Module):
    """Runs a registered layer through something else that holds it."""

    def __init__(self, kind):
        super().__init__()
        make, self.run = HOLDERS[kind]
        self.layer = nn.Linear(64, 16)
        # not by setattr: that would register a module
        self.__dict__["held"] = make(self.layer)
        self.__dict__["again"] = make(self.layer)

    def forward(self, x):
        return self.run(self.held, x) + self.run(self.again, x)


@pytest.mark.parametrize("kind", HOLDERS)
def test_every_holder_sees_the_quantized_layer_and_the_plain_one_after_it(kind):
    model, x = nn.Sequential(Holding(kind)), torch.randn(3, 64)
    old = weakref.ref(model[0].layer)
    wanted = model(x)
    freeze(quantize(model, "int4"))
    gc.collect()
    assert old() is None, "the float layer is still held"
    layer = model[0].layer
    assert isinstance(layer, QLinear)
    assert torch.equal(model(x), layer(x) + layer(x)) and not torch.equal(model(x), wanted)
    rounded = model(x)
    dequantize(model)
    assert type(model[0].layer) is nn.Linear
    torch.testing.assert_close(model(x), rounded, rtol=1e-5, atol=1e-5)


def test_containers_stay_the_same_objects():
    net = nn.Sequential(Holding("list"))
    shared = net[0].held
    outside = {"also": shared}
    quantize(net, "int8")
    assert net[0].held is shared is outside["also"] and shared[0] is net[0].layer


def test_a_hook_that_knows_a_layer_sees_the_new_one():
    net, found = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), []
    first = net[0]
    net[1].register_forward_hook(lambda *_: found.append(type(first)))
    freeze(quantize(net, "int8"))(torch.randn(2, 8))
    assert found == [QLinear]


def test_what_holds_no_layer_is_left_alone():
    class Odd(dict):
        def __setitem__(self, key, value):
            raise AssertionError

    net = Holding("list")
    net.odd, net.pair, net.names = Odd(), (1, 2), frozenset("ab")
    pair, names = net.pair, net.names
    freeze(quantize(nn.Sequential(net), "int8"))
    assert net.pair is pair and net.names is names


def test_a_long_chain_of_objects_is_no_problem():
    net = nn.Sequential(nn.Linear(8, 8))
    chain = []
    for _ in range(100_000):
        chain = [chain]
    net.chain = chain
    assert isinstance(quantize(net, "int8")[0], QLinear)
    # taken apart one by one: Python itself would recurse
    while chain:
        chain = chain.pop()


class Tied(nn.Module):
    """A layer whose weight has a second owner, before or after it in the order of modules."""

    def __init__(self, hold):
        super().__init__()
        self.layer, self.other = nn.Linear(8, 8), nn.Module()
        hold(self)


OWNERS = {
    "a parameter before it": (lambda m: setattr(m, "w", m.layer.weight), "w"),
    "a parameter after it": (lambda m: setattr(m.other, "w", m.layer.weight), "other.w"),
    "a list": (lambda m: m.__dict__.update(ws=[m.layer.weight]), "ws"),
    "an object": (lambda m: m.other.__dict__.update(held=Plain(m.layer.weight)), "other.held"),
    "a module that is not registered": (lambda m: m.__dict__.update(held=[Unregistered(m.layer.weight)]), "held"),
}


@pytest.mark.parametrize(("hold", "place"), OWNERS.values(), ids=OWNERS)
def test_a_weight_that_something_else_holds_too_stays_float(hold, place):
    net = Tied(hold)
    assert assign(net, Choice("int8")).left == {"layer": f"its weight is tied to {place}"}
