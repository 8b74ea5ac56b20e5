"""quanto-hf kernels: with the native library, and without."""

import json

import pytest
import torch
from typer.testing import CliRunner

from quanto_hf.cli.app import app
from quanto_hf.ops import OPS, AqlmWeight
from quanto_hf.ops.cpu.library import NATIVE
from quanto_hf.ops.registry import why_kernel_wrong
from quanto_hf.ops.selfcheck import TOLERANCE
from quanto_hf.qtypes import QTYPES
from quanto_hf.schemes import Aqlm, make_scheme

native = pytest.mark.skipif(NATIVE is None, reason="there are no native kernels")


def kernels(*words: str):
    return CliRunner().invoke(app, ["kernels", "--features", "96x160", *words])


def found(*words: str) -> dict:
    result = kernels(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_every_op_of_every_type_has_a_kernel_and_a_sentence_for_each_other_one():
    rows = found()["kernels"]
    assert len({row["weights"] for row in rows}) == len(QTYPES) + len(Aqlm.examples)
    for row in rows:
        assert row["runs"] not in row["others"]
        if row["op"] == "linear, int8 x":
            assert {row["runs"], *row["others"]} >= {"rounding, linear", "native_int8"}
        elif row["op"] == "quantize":
            assert {row["runs"], *row["others"]} == {"native", "reference"}
        else:
            in_torch = {"torch_blocks", "torch_rows", "each_expert"} & {row["runs"], *row["others"]}
            assert len(in_torch) == 1 and "reference" in row["others"]
        assert all(len(said.split()) > 2 for said in row["others"].values())
    assert {row["op"] for row in rows} == {*OPS, "linear, int8 x"} - {"linear_rounded"}
    assert {count for row in rows for count in row["rows"]} == {1, 128}


def test_the_table_says_what_the_json_says():
    result, rows = kernels("--weights", "int8"), found("--weights", "int8")["kernels"]
    assert all(row["runs"] in result.stdout for row in rows)
    assert "int8" in result.stdout and "torch_blocks" in result.stdout and "cores in use" in result.stdout


@native
def test_self_checks_of_the_chosen_type_grouping_and_dtype():
    result = found("--weights", "int4", "--group-size", "32", "--dtype", "float16")
    (row,) = result["checks"]
    assert (row["weights"], row["passed"], row["said"]) == ("int4 g32 asym", True, [])
    assert 0 < row["few_rows_error"] <= row["tolerance"] == TOLERANCE[torch.float16]
    assert result["machine"]["level"] in result["machine"]["levels"]
    assert "pass" in kernels("--weights", "int4").stdout


@native
@pytest.mark.parametrize("weights", QTYPES)
def test_int8_activations_are_checked_where_there_is_a_kernel(weights):
    result = found("--weights", weights)
    (check,), runs = result["checks"], {row["op"]: row["runs"] for row in result["kernels"]}
    has_kernel = runs["linear, int8 x"] == "native_int8"
    assert has_kernel == (check["int8_activations_error"] is not None)
    if has_kernel:
        assert 0 < check["int8_activations_error"] <= check["tolerance"]


@native
def test_a_kernel_that_disagrees_is_told_and_exits_with_1(monkeypatch):
    why_kernel_wrong.cache_clear()
    monkeypatch.setitem(TOLERANCE, torch.bfloat16, 0.0)
    result = kernels("--weights", "int2")
    why_kernel_wrong.cache_clear()
    assert result.exit_code == 1
    assert "FAIL" in result.stdout and "disagrees with the reference" in result.stdout
    assert "torch_blocks" in result.stdout


@native
@pytest.mark.parametrize("weights", ["aqlm-2x8", "aqlm-1x16", "aqlm-3x5"])
def test_aqlm_layouts_are_shown_and_checked_like_number_types(weights):
    result = found("--weights", weights)
    operators = {op.name for op in OPS.values() if AqlmWeight in op.kinds}
    assert {row["op"] for row in result["kernels"]} == operators - {"linear_rounded"} | {"linear, int8 x"}
    assert {row["op"]: row["runs"] for row in result["kernels"]}["linear"] == "native"
    (check,) = result["checks"]
    assert check["passed"] and check["weights"] == str(make_scheme(weights)) and check["int8_activations_error"] is None
    assert 0 < check["many_rows_error"] <= check["tolerance"] and 0 < check["few_rows_error"] <= check["tolerance"]
    assert check["weights"] in kernels("--weights", weights).stdout


@native
def test_an_aqlm_kernel_that_disagrees_exits_with_1(monkeypatch):
    why_kernel_wrong.cache_clear()
    monkeypatch.setitem(TOLERANCE, torch.bfloat16, 0.0)
    result = kernels("--weights", "int8,aqlm-1x8")
    why_kernel_wrong.cache_clear()
    assert result.exit_code == 1 and "aqlm 1x8 g8" in result.stdout and "FAIL" in result.stdout


def test_layouts_and_number_types_may_be_asked_for_together():
    rows = found("--weights", "int4,aqlm-2x8")["kernels"]
    assert {row["weights"] for row in rows} == {"int4 g64 asym", "aqlm 2x8 g8"}


def test_a_group_size_leaves_out_types_that_cannot_have_it():
    names = {row["weights"].split()[0] for row in found("--group-size", "32")["kernels"]}
    assert "int4" in names and not any(name.startswith("float8") for name in names)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--weights", "int3"], "--weights int3: 'int3' is not a number type; choose one of"),
        (["--weights", "float8", "--group-size", "32"], "--weights float8: group_size=32 does not work"),
        (["--weights", "aqlm-2x32"], "--weights aqlm-2x32: nbits=32 does not work"),
        (
            ["--weights", "aqlm-2x8", "--group-size", "64"],
            "--features 96x160: in_features=160 is not a multiple of the 64",
        ),
        (["--group-size", "7"], "--group-size 7: no number type"),
        (["--dtype", "int8"], "--dtype int8 is not known; choose one of float32"),
        (["--rows", "0"], "--rows 0 is not a list of whole numbers above 0"),
        (["--features", "12"], "--features 12 is not OUTxIN"),
    ],
)
def test_wrong_usage_is_one_line_and_exits_with_2(words, said):
    result = kernels(*words)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith(f"error: {said}")


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("QUANTO_HF_CPU", "torch", "no kernels: QUANTO_HF_CPU=torch switches the native kernels off"),
        ("QUANTO_HF_REFERENCE", "1", "torch_blocks: QUANTO_HF_REFERENCE is set"),
    ],
)
def test_what_the_environment_asks_for_is_told(variable, value, said, done):
    result = done[variable]
    assert result.returncode == 0, result.stderr
    assert f"{variable}={value}" in result.stdout and said in result.stdout.replace("native_blocks, ", "")
