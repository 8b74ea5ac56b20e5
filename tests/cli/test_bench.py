"""quanto-hf bench, on tiny sizes."""

import json

import pytest
from typer.testing import CliRunner

import quanto_hf
from quanto_hf import QuantoConfig
from quanto_hf.cli import bench_linear, peers
from quanto_hf.cli.app import app
from quanto_hf.hf.convert.convert import convert_checkpoint

TINY = ("--features", "48x64", "--rows", "1,12", "--rounds", "2")


def bench(*words: object):
    return CliRunner().invoke(app, ["bench", *map(str, words)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_linear_layers_are_right_and_have_a_ratio(dtype):
    result = bench("linear", *TINY, "--dtype", dtype, "--json")
    assert result.exit_code == 0, result.stdout
    found = json.loads(result.stdout)
    assert (found["features"], found["dtype"], found["threads"]) == ([48, 64], dtype, 2)
    assert [row["rows"] for row in found["rows"]] == [1, 12] * 6
    for row in found["rows"]:
        assert row["ratio"] == pytest.approx(row["torch_seconds"] / row["seconds"])
        assert row["error"] < 0.01 and row["error"] < row["distance"]


def test_activations_are_timed_beside_the_same_weights_without():
    result = bench("linear", *TINY, "--weights", "int4,nf4", "--activations", "int8", "--json")
    assert result.exit_code == 0, result.stdout
    rows = json.loads(result.stdout)["rows"]
    names = ["int4 g64 asym", "int4 g64 asym, int8 x", "nf4 g32", "nf4 g32, int8 x"]
    assert [row["layer"] for row in rows] == [name for name in names for _ in range(2)]
    # the error is that of the kernel, not of the rounding
    assert all(row["ratio"] > 0 and row["error"] < 0.01 < row["distance"] for row in rows)
    assert all(row["kernel"].startswith("rounding, ") for row in rows[6:])


def test_static_scales_are_timed_beside_those_of_tokens():
    result = bench("linear", *TINY, "--weights", "int8", "--activations", "int8,float8", "--static", "--json")
    assert result.exit_code == 0, result.stdout
    rows = json.loads(result.stdout)["rows"]
    names = ["int8", "int8, int8 x", "int8, static int8 x", "int8, float8_e4m3fn x", "int8, static float8_e4m3fn x"]
    assert [row["layer"] for row in rows] == [name for name in names for _ in range(2)]
    assert all(row["ratio"] > 0 and row["error"] < 0.005 < row["distance"] for row in rows[2:])
    # one scale is another rounding than that of each token
    assert all(rows[i]["distance"] != rows[i + 2]["distance"] for i in (2, 3, 6, 7))


def test_the_table():
    result = bench("linear", *TINY, "--weights", "int4", "--threads", "1")
    assert result.exit_code == 0, result.stderr
    assert "int4 g64 asym" in result.stdout and "48x64, bfloat16, 1 thread;" in result.stdout


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    monkeypatch.setattr(bench_linear, "ALLOWED", dict.fromkeys(bench_linear.ALLOWED, 0.0))
    result = bench("linear", *TINY, "--weights", "int4")
    assert result.exit_code == 1
    assert "off the reference: not timed" in result.stdout


def test_a_peer_is_timed_and_one_that_is_missing_has_a_reason(monkeypatch):
    def missing(linear):
        raise ModuleNotFoundError("No module named 'other'")

    monkeypatch.setattr(peers, "PEERS", {("same", "int8"): lambda linear: linear, ("other", "int8"): missing})
    result = bench("linear", *TINY, "--weights", "int8", "--peers", "--json")
    assert result.exit_code == 0, result.stdout
    rows = json.loads(result.stdout)["rows"]
    assert [(row["layer"], row["rows"]) for row in rows[2:]] == [
        ("same int8", 1),
        ("same int8", 12),
        ("other int8", None),
    ]
    assert rows[2]["distance"] < 0.01 and rows[2]["error"] is None
    shown = bench("linear", *TINY, "--weights", "int8", "--peers")
    assert "other int8: ModuleNotFoundError: No module named 'other'" in shown.stdout


def test_layers_take_turns_with_weights_of_their_own():
    made = iter(range(1000))
    layers = bench_linear.rotation(lambda: next(made), bench_linear.ROTATED_BYTES // 3 + 1)
    assert [next(layers) for _ in range(5)] == [0, 1, 2, 0, 1]


def test_a_model():
    result = bench("model", "--weights", "int4", "--tokens", "4", "--rounds", "1", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    first, second = found["rows"]
    assert (found["model"], found["threads"], first["model"], second["model"]) == ("bundled", 1, "bfloat16", "int4")
    assert second["footprint"] < first["footprint"]
    for row in (first, second):
        assert set(row["ratio"]) == {"decode_1", "decode_8", "prefill"}
        assert all(row[key] > 0 and ratio > 0 for key, ratio in row["ratio"].items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["linear", "--weights", "int8,int3"], "--weights int3: 'int3' is not a number type; choose one of"),
        (["linear", "--features", "4096"], "--features 4096 is not OUTxIN"),
        (["linear", "--features", "0x64"], "--features 0x64 is not OUTxIN"),
        (["linear", "--threads", "0"], "--threads 0 is below 1"),
        (["linear", "--rows", "1,x"], "--rows 1,x is not a list"),
        (
            ["linear", "--activations", "int4"],
            "--activations int4: activations='int4' is not supported; choose None, int8",
        ),
        (["linear", "--dtype", "half"], "--dtype half is not known"),
        (["model", "--weights", "int3"], "--weights int3: 'int3' is not a number type"),
        (["model", "/nowhere"], "/nowhere is not a folder with a model"),
        (["model", "--threads", "-1"], "--threads -1 is below 1"),
        (["model", "--tokens", "1"], "--tokens 1 is too few"),
    ],
)
def test_wrong_usage_is_one_line_and_exits_with_2(words, said):
    result = bench(*words)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert result.stderr.startswith(f"error: {said}")


def test_a_folder_without_a_model_and_a_quantized_model(tmp_path):
    result = bench("model", tmp_path)
    assert result.exit_code == 2 and "is not a model: it has no config.json" in result.stderr
    convert_checkpoint(quanto_hf.tiny_lm(), tmp_path / "int8", QuantoConfig(weights="int8"))
    result = bench("model", tmp_path / "int8")
    assert result.exit_code == 2 and "is quantized already" in result.stderr


def test_without_the_native_library(done):
    result = done["bench without the library"]
    assert result.returncode == 0, result.stderr
    ran = [row["kernel"] for row in json.loads(result.stdout)["rows"]]
    assert ran == ["torch_int8pack", "torch_blocks", "torch_blocks", "torch_blocks"]
