"""identity: equal for equal values in every process, and different for others."""

import copy
import json
import subprocess
import sys
from enum import Enum
from functools import partial
from typing import Any

import pytest
import torch
from transformers.core_model_loading import Chunk, Concatenate, VisionFuseAndPermuteForRope

from quanto_hf.fit.mse import Mse
from quanto_hf.hf.offload.identity import identity


class Slotted:
    __slots__ = ("a", "b")

    def __init__(self, a: Any) -> None:
        self.a = a


class Held:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class Color(Enum):
    RED = 1


def adds(n: int) -> Any:
    return lambda x: x + n


LONG = torch.arange(5000)
PAIRS = {
    "objects": (lambda: Held(a=Held(b=1)), lambda: Held(a=Held(b=2))),
    "operations": (lambda: VisionFuseAndPermuteForRope(), lambda: VisionFuseAndPermuteForRope(dim=1)),
    "types": (lambda: Chunk(0), lambda: Concatenate(0)),
    "tensors": (lambda: LONG.clone(), lambda: LONG.index_fill(0, torch.tensor([2500]), 7)),
    "dtypes": (lambda: torch.ones(2), lambda: torch.ones(2, dtype=torch.bfloat16)),
    "slots": (lambda: Slotted(1), lambda: Slotted(2)),
    "functions": (lambda: adds(1), lambda: adds(2)),
    "partials": (lambda: partial(max, key=len), lambda: partial(min, key=len)),
    "numbers": (lambda: 1, lambda: True),
    "kinds of lists": (lambda: [1, 2], lambda: (1, 2)),
    "dicts": (lambda: {"a": 1, "b": 2}, lambda: {"a": 2, "b": 1}),
    "NaN": (lambda: float("nan"), lambda: float("inf")),
    "enums": (lambda: Color.RED, lambda: "RED"),
    "fits": (lambda: Mse(), lambda: Held(**vars(Mse()))),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_equal_values_have_one_identity_and_others_have_another(kind: str):
    one, other = PAIRS[kind]
    found = json.loads(json.dumps(identity(one())))
    assert found == json.loads(json.dumps(identity(one()))) == identity(copy.deepcopy(one()))
    assert found != identity(other())


def test_the_order_of_dicts_and_sets_does_not_matter():
    assert identity({"a": 1, "b": 2}) == identity({"b": 2, "a": 1})
    code = "from quanto_hf.hf.offload.identity import identity; print(identity({'x', 'y', 'zz', ('a', 1)}))"
    run = lambda seed: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
    )
    assert run("1").stdout == run("2").stdout != ""


def test_what_holds_itself_has_an_identity():
    one, other = Held(), Held()
    one.me, other.me = one, other
    assert identity(one) == identity(other)


def test_what_cannot_be_told_from_others_is_equal_to_nothing():
    value = (item for item in "abc")
    assert identity(value) != identity(value)
