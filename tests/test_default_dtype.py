"""The same bits under every default dtype of torch, and wherever the first call is made.

Each setting has a process of its own (``default_dtype_program.py``): self-checks of kernels and tables are made once in
a process, by the first call.
"""

import json
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from forked import MODELS, Program, run_all

from quanto_hf.nn import QLinear
from quanto_hf.schemes import make_scheme

PROGRAM = Path(__file__).with_name("default_dtype_program.py")


DTYPES = ("bfloat16", "float16", "float64")
AROUND = ("autocast", "device", "inference")
SETTINGS = [("float32", ""), *((dtype, "") for dtype in DTYPES), *(("float32", around) for around in AROUND)]


@cache
def results():
    """What became of the program in each setting."""
    code = PROGRAM.read_text()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = run_all([Program(code, arguments=setting) for setting in SETTINGS], MODELS, environment=environment)
    return dict(zip(SETTINGS, done, strict=True))


def found(dtype, around=""):
    """Name of each case -> the digest of what it gives."""
    done = results()[dtype, around]
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_case_runs_with_float32():
    cases = found("float32")
    assert len(cases) > 90 and [f"{name}: {text}" for name, text in cases.items() if len(text) != 64] == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_default_dtype_changes_a_bit(dtype):
    cases, wanted = found(dtype), found("float32")
    assert {name: text for name, text in cases.items() if text != wanted.get(name)} == {}


@pytest.mark.parametrize("around", AROUND)
def test_it_does_not_matter_where_the_first_calls_are_made(around):
    cases, wanted = found("float32", around), found("float32")
    assert {name: text for name, text in cases.items() if text != wanted.get(name)} == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_layer_that_is_made_without_a_dtype_has_the_default_one(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        layer = QLinear(64, 8, scheme=make_scheme("int4"))
        named = QLinear(64, 8, scheme=make_scheme("int4"), dtype=torch.float32)
    finally:
        torch.set_default_dtype(before)
    assert layer.weight.dtype == layer.bias.dtype == dtype and named.weight.dtype == torch.float32
    # what is stored has the dtypes of the format
    assert layer.weight_scale.dtype == torch.bfloat16
