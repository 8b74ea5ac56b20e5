"""quanto-hf inspect."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save
from typer.testing import CliRunner

import quanto_hf
from quanto_hf import QuantoConfig
from quanto_hf.cli.app import app
from quanto_hf.hf.convert import convert_checkpoint


@pytest.fixture
def sharded(tmp_path):
    """A quantized model in several files."""
    source = save("llama", tmp_path / "float", torch.bfloat16)
    config = QuantoConfig(weights="int4", overrides={"down_proj": {"weights": "int8"}})
    convert_checkpoint(source, tmp_path / "out", config, max_shard_size="30KB")
    return tmp_path / "out"


def inspect(*words: object):
    return CliRunner().invoke(app, ["inspect", *map(str, words)])


def as_json(*words: object) -> dict:
    result = inspect(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_counts_parameters_and_bytes_are_those_of_the_loaded_model(sharded):
    found = as_json(sharded)
    model = quanto_hf.load_and_quantize_model(sharded)
    report = quanto_hf.report(model)
    assert found["format_version"] == model.config.quantization_config.format_version
    assert found["files"] > 1
    assert found["total"]["nbytes"] == report.nbytes
    for row in found["rows"]:
        same = [r for r in report.rows if r.stored == row["stored"]]
        assert row["count"] == len(same)
        assert row["nbytes"] == sum(r.nbytes for r in same)
        assert row["parameters"] == sum(torch.Size(r.shape).numel() for r in same)
    every = as_json(sharded, "--all")["rows"]
    assert {row["name"]: row["nbytes"] for row in every} == {row.name: row.nbytes for row in report.rows}


def test_tables(sharded):
    short, long = inspect(sharded), inspect(sharded, "--all")
    assert "int4 g64 asym" in short.stdout and "total" in short.stdout
    assert "model.layers.1.mlp.down_proj.weight" in long.stdout


def test_a_float_model():
    found = as_json(quanto_hf.tiny_lm())
    assert found["format_version"] is None
    assert [row["stored"] for row in found["rows"]] == ["bfloat16"]
    assert found["total"]["bits"] == 16


def test_a_missing_file_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink(missing_ok=True)
    files = sorted(sharded.glob("*.safetensors"))
    files[0].unlink()
    result = inspect(sharded)
    assert result.exit_code == 1
    assert "names files that are not there" in result.stderr and files[0].name in result.stderr


def test_a_damaged_file_is_named(sharded):
    file = sorted(sharded.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-5])
    result = inspect(sharded)
    assert result.exit_code == 1
    assert file.name in result.stderr and "cannot be read" in result.stderr


def test_missing_and_unexpected_tensors_against_the_index_are_all_named(sharded):
    file = sorted(sharded.glob("*.safetensors"))[-1]
    tensors = load_file(file)
    gone = min(tensors)
    del tensors[gone]
    save_file({**tensors, "more": torch.zeros(1)}, file)
    error = inspect(sharded).stderr
    assert f"missing: {gone}" in error and "unexpected: more" in error


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, n: t.pop(f"{n}_scale"), "missing: {n}_scale"),
        (lambda t, n: t.update({f"{n}_more": torch.zeros(2)}), "unexpected: {n}_more"),
        (lambda t, n: t.update({f"{n}_scale": t[f"{n}_scale"].float()}), "wrong: {n}_scale is float32"),
        (lambda t, n: t.update({f"{n}_packed": t[f"{n}_packed"][:5].clone()}), "wrong: {n}_scale"),
        (lambda t, n: [t.pop(key) for key in list(t) if key.startswith(n)], "missing: {n}_packed"),
    ],
    ids=["missing", "unexpected", "dtype", "shape", "gone"],
)
def test_wrong_tensors_of_one_file_are_named(tmp_path, change, said):
    source = save("llama", tmp_path / "float", torch.bfloat16)
    convert_checkpoint(source, tmp_path / "out", QuantoConfig(weights="int4"))
    file, name = tmp_path / "out" / "model.safetensors", "model.layers.0.self_attn.k_proj.weight"
    tensors = load_file(file)
    change(tensors, name)
    save_file(tensors, file)
    result = inspect(tmp_path / "out")
    assert result.exit_code == 1
    assert said.format(n=name) in result.stderr


def test_a_newer_format_and_a_broken_config(sharded):
    config = json.loads((sharded / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (sharded / "config.json").write_text(json.dumps(config))
    assert "format_version=99 cannot be read" in inspect(sharded).stderr
    (sharded / "config.json").write_text("{")
    assert "config.json cannot be read" in inspect(sharded).stderr


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "has no safetensors files" in inspect(tmp_path).stderr
