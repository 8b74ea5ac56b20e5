"""One contract for every scheme, and the errors for values that do not go together."""

import doctest
import importlib
import json
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from quanto_hf.qtypes import QTYPES
from quanto_hf.schemes import (
    GROUP_SIZES,
    Affine,
    Float8,
    Lookup,
    Scheme,
    make_scheme,
    scheme_from_dict,
)

EVERY = [
    cls(name, group_size, symmetric)
    for cls in (Affine, Float8, Lookup)
    for name in cls.qtypes()
    for group_size in ((-1,) if cls is Float8 else (-1, *GROUP_SIZES))
    for symmetric in ((True, False) if name in ("int2", "int4") else (True,))
]
every_scheme = pytest.mark.parametrize("scheme", EVERY, ids=lambda s: str(s).replace(" ", "-"))
DEFAULT = [make_scheme(name) for name in QTYPES]
default_scheme = pytest.mark.parametrize("scheme", DEFAULT, ids=lambda s: str(s).replace(" ", "-"))

SHAPES = [(1, 1), (1, 5), (3, 200), (2, 3, 77), (0, 5), (4, 2880)]
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The largest error of a value when the full range is on the grid, in units of the largest value: half the widest gap
# between two numbers; a whole step for int2 and int4, whose symmetric grids end a step earlier on one side.
LARGEST_ERROR = {
    "int2": 1 / 2,
    "int4": 1 / 8,
    "int8": 1 / 254,
    "nf4": (1 - 0.696) / 2,
    "fp4": 1 / 6,
    "float8_e4m3fn": 2**-4,
    "float8_e5m2": 2**-3,
}
every_float = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)


def kind(scheme: Scheme) -> tuple[str, bool]:
    return scheme.qtype, scheme.symmetric


def in_turn(name: str, cases: list[Any]) -> pytest.MarkDecorator:
    """Two of the cases for each scheme, so that over its group sizes, which behave alike, each kind of number meets all
    of them. A kind of number with a single scheme meets all of them there."""
    pairs = []
    for first in dict.fromkeys(map(kind, EVERY)):
        schemes = [scheme for scheme in EVERY if kind(scheme) == first]
        each = max(2, -(-len(cases) // len(schemes)))
        pairs += [(s, cases[(each * i + j) % len(cases)]) for i, s in enumerate(schemes) for j in range(each)]
    ids = [f"{scheme}-{case}".replace(" ", "") for scheme, case in pairs]
    return pytest.mark.parametrize(f"scheme, {name}", pairs, ids=ids)


shapes_in_turn = in_turn("shape", SHAPES)


@shapes_in_turn
def test_quantize_makes_exactly_the_tensors_that_the_scheme_announced(scheme: Scheme, shape: tuple[int, ...]):
    for dtype in FLOATS.values():
        made, announced = scheme.quantize(torch.randn(shape).to(dtype)), scheme.tensors(shape, dtype)
        assert list(made) == list(announced)
        for name, spec in announced.items():
            assert (tuple(made[name].shape), made[name].dtype) == (spec.shape, spec.dtype)
            assert made[name].is_contiguous() and made[name].nbytes == spec.nbytes
        assert scheme.nbytes(shape, dtype) == sum(tensor.nbytes for tensor in made.values())


@shapes_in_turn
def test_what_was_quantized_comes_back_in_its_shape_and_near(scheme: Scheme, shape: tuple[int, ...]):
    weight = torch.randn(shape)
    tensors = scheme.quantize(weight)
    for dtype in FLOATS.values():
        made = scheme.dequantize(tensors, shape[-1], dtype)
        assert made.shape == shape and made.dtype == dtype
    made = scheme.dequantize(tensors, shape[-1], torch.float32)
    # no default fit ends worse than the full range, and the bfloat16 scale adds less than 1 %
    largest = weight.abs().max() if weight.numel() else 0.0
    assert (made - weight).norm() <= 1.01 * LARGEST_ERROR[scheme.qtype] * largest * weight.numel() ** 0.5


@shapes_in_turn
def test_leading_dimensions_are_quantized_like_rows(scheme: Scheme, shape: tuple[int, ...]):
    weight = torch.randn(shape)
    tensors, flat = scheme.quantize(weight), scheme.quantize(weight.view(-1, shape[-1]))
    assert all(torch.equal(tensors[name].flatten(0, -2), flat[name]) for name in flat)


@in_turn("index", [[2, 0, 2], [[1, 3], [0, 0]], [], 3])
def test_rows_are_those_of_the_whole_weight(scheme: Scheme, index):
    tensors, chosen = scheme.quantize(torch.randn(4, 77)), torch.tensor(index, dtype=torch.long)
    for dtype in FLOATS.values():
        whole = scheme.dequantize(tensors, 77, dtype)
        assert torch.equal(scheme.rows(tensors, chosen, 77, dtype), whole[chosen])


@in_turn("shape", [shape for shape in SHAPES if len(shape) == 2])
def test_linear_is_the_product_with_the_dequantized_weight(scheme: Scheme, shape: tuple[int, ...]):
    tensors, (rows, columns) = scheme.quantize(torch.randn(shape)), shape
    x, bias = torch.randn(2, 3, columns), torch.randn(rows)
    weight = scheme.dequantize(tensors, columns, torch.float32)
    made = scheme.linear(x, tensors, bias)
    assert made.shape == (2, 3, rows)
    # float32 sums in another order, and a scale that multiplies the sum instead of the weight: columns + 4 roundings
    bound = (columns + 4) * 2**-24 * (F.linear(x.abs(), weight.abs()) + bias.abs()) + 1e-30
    assert ((made - F.linear(x, weight, bias)).abs() <= bound).all()


@every_scheme
def test_a_scheme_survives_json_and_is_equal_hashable_and_frozen(scheme: Scheme):
    again = scheme_from_dict(json.loads(json.dumps(scheme.to_dict())))
    assert again == scheme and type(again) is type(scheme)
    assert len({scheme, again}) == 1
    with pytest.raises(AttributeError):
        scheme.group_size = 32


def test_every_scheme_has_a_name_of_its_own():
    assert len({str(scheme) for scheme in EVERY}) == len(EVERY)


@every_scheme
def test_a_weight_need_not_be_contiguous(scheme: Scheme):
    weight = torch.randn(200, 3)
    made, expected = scheme.quantize(weight.T), scheme.quantize(weight.T.contiguous())
    assert all(torch.equal(made[name], expected[name]) for name in expected)


@default_scheme
@every_float
def test_blocks_of_rows_join_without_a_seam(scheme: Scheme, dtype: torch.dtype, monkeypatch):
    # torch alone works on blocks
    monkeypatch.setenv("QUANTO_HF_REFERENCE", "1")
    weight = torch.randn(23, 77).to(dtype)
    whole = scheme.quantize(weight)
    monkeypatch.setattr(importlib.import_module("quanto_hf.ops.quantize"), "BLOCK_VALUES", 300)
    parts = scheme.quantize(weight)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


@in_turn("bad", [(bad, column) for bad in (torch.nan, torch.inf, -torch.inf) for column in (0, 199)])
def test_a_weight_with_a_value_that_is_not_finite_is_refused(scheme: Scheme, bad: tuple[float, int]):
    value, column = bad
    weight = torch.randn(3, 200)
    weight[1, column] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        scheme.quantize(weight)


@default_scheme
@pytest.mark.parametrize(
    "weight, said",
    [
        (torch.zeros(5), ["2 dimensions", "(5,)"]),
        (torch.zeros(2, 5, dtype=torch.int32), ["float dtype", "torch.int32"]),
        (torch.zeros(5, 0), ["1 column", "(5, 0)"]),
    ],
    ids=["1-d", "integer", "no-columns"],
)
def test_what_is_no_weight_is_refused(scheme: Scheme, weight: torch.Tensor, said: list[str]):
    with pytest.raises(ValueError) as caught:
        scheme.quantize(weight)
    assert all(text in str(caught.value) for text in said)


@default_scheme
def test_a_weight_keeps_its_values_and_gets_no_gradient(scheme: Scheme):
    weight = torch.randn(3, 77, requires_grad=True)
    kept = weight.detach().clone()
    assert not any(tensor.requires_grad for tensor in scheme.quantize(weight).values())
    assert torch.equal(weight, kept)


@default_scheme
def test_autocast_changes_nothing(scheme: Scheme):
    weight = torch.randn(5, 200)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = scheme.quantize(weight)
        shown = scheme.dequantize(made, 200, torch.float32)
    expected = scheme.quantize(weight)
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    assert torch.equal(shown, scheme.dequantize(expected, 200, torch.float32))


def test_the_defaults_are_those_of_the_number_type():
    defaults = {
        "int8": (-1, True, "absmax"), "float8_e4m3fn": (-1, True, "absmax"), "float8_e5m2": (-1, True, "absmax"),
        "int4": (64, False, "mse"), "nf4": (32, True, "mse"), "fp4": (32, True, "mse"), "int2": (64, False, "mse_gain"),
    }  # fmt: skip
    assert list(QTYPES) == list(defaults)
    for name, wanted in defaults.items():
        scheme = make_scheme(name)
        assert (scheme.group_size, scheme.symmetric, scheme.default_fit().name) == wanted and scheme.qtype == name
    assert make_scheme("qfloat8") == Float8("float8_e4m3fn")


def test_the_default_of_each_type_of_4_bits_stores_4_and_a_half_bits_per_weight():
    for name in (scheme.qtype for scheme in DEFAULT if QTYPES[scheme.qtype].bits == 4):
        assert make_scheme(name).nbytes((10, 4096), torch.float32) * 8 == 4.5 * 10 * 4096


def test_half_a_byte_and_the_groups_of_a_row_are_what_int4_costs():
    # 4096 / 2 bytes of codes, 64 groups with scale and zero of 2 bytes each
    assert make_scheme("int4").nbytes((10, 4096), torch.float32) == 10 * (2048 + 64 * 4)


BAD = {
    "type": (lambda: make_scheme("int3"), ["'int3'", "int2", "int4", "nf4"]),
    "type-of-scheme": (lambda: Affine("nf4"), ["'nf4'", "affine", "int2, int4 or int8"]),
    "group-size": (lambda: make_scheme("int4", group_size=48), ["group_size=48", "16, 32, 64, 128 or 256", "-1"]),
    "group-size-0": (lambda: make_scheme("int4", group_size=0), ["group_size=0", "16, 32"]),
    "group-size-float": (lambda: make_scheme("int4", group_size=64.0), ["group_size=64.0", "16, 32"]),
    "group-size-text": (lambda: Lookup("nf4", "64"), ["group_size='64'", "16, 32"]),
    "group-of-float8": (lambda: make_scheme("float8", group_size=64), ["group_size=64", "float8_e4m3fn", "choose -1"]),
    "asymmetric-int8": (lambda: make_scheme("int8", symmetric=False), ["int8 weights are symmetric"]),
    "asymmetric-nf4": (lambda: make_scheme("nf4", symmetric=False), ["nf4 weights are symmetric"]),
    "symmetric-text": (lambda: Affine("int4", 64, "false"), ["symmetric='false'", "True or False"]),
    "kind": (lambda: scheme_from_dict({"kind": "magic"}), ["'magic'", "affine, aqlm, float8, lookup"]),
    "kind-of-no-name": (lambda: scheme_from_dict({"kind": ["affine"]}), ["['affine']", "affine, aqlm, float8, lookup"]),
    "no-kind": (lambda: scheme_from_dict({"qtype": "int4"}), ["None", "affine, aqlm, float8, lookup"]),
    "unknown-field": (lambda: scheme_from_dict({"kind": "affine", "qtype": "int4", "groups": 3}), ["groups"]),
    "missing-field": (lambda: scheme_from_dict({"kind": "affine"}), ["qtype"]),
    "fit": (lambda: make_scheme("int4").quantize(torch.ones(1, 5), "best"), ["'best'", "absmax, hqq, minmax, mse"]),
    "fit-of-type": (lambda: make_scheme("int8").quantize(torch.ones(1, 5), "hqq"), ["hqq", "'mse' or 'absmax'"]),
}


@pytest.mark.parametrize("make, said", BAD.values(), ids=BAD)
def test_values_that_do_not_go_together_are_an_error_that_says_what_came_and_what_is_allowed(make, said: list[str]):
    with pytest.raises(ValueError) as caught:
        make()
    assert all(text in str(caught.value) for text in said), str(caught.value)


MEASURE = """
    import os, sys, threading, torch
    from quanto_hf.schemes import make_scheme

    def anonymous():  # bytes
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) << 10

    def measure(name):
        torch.set_num_threads(2)
        weight = torch.ones(4096, 4096, dtype=torch.bfloat16).normal_()
        scheme, peak, done = make_scheme(name), 0, threading.Event()

        def watch():
            nonlocal peak
            while not done.wait(0.0005):
                peak = max(peak, anonymous())

        before, thread = anonymous(), threading.Thread(target=watch)
        thread.start()
        result = scheme.quantize(weight)
        done.set()
        thread.join()
        print(name, peak - before, sum(tensor.nbytes for tensor in result.values()), flush=True)

    for name in sys.argv[1:]:
        # a new process for each, so that none finds memory that the one before it has left
        if (child := os.fork()) == 0:
            measure(name)
            os._exit(0)
        os.waitpid(child, 0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_quantizing_takes_the_memory_of_the_result_and_64_mb_at_most():
    names = [scheme.qtype for scheme in DEFAULT]
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), *names]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[0] for line in lines] == names
    for line in lines:
        name, growth, result = line.split()
        # a float32 copy of the weight alone would be 64 MB, the float32 temporaries of a fit four times as much
        assert int(growth) <= int(result) + (64 << 20), f"{name} took {int(growth) >> 20} MB"
        # the watcher saw something
        assert int(growth) >= int(result) // 2


def test_the_examples_in_the_docstrings_are_true():
    result = doctest.testmod(importlib.import_module("quanto_hf.schemes"))
    assert result.attempted and not result.failed
