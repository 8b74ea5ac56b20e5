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
from quanto_hf.hf.convert.convert import convert_checkpoint


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


# ---------------------------------------------------------------------------------------------------------- --verify


def changed(folder, end, change):
    """Change the first tensor whose name ends so, in its file; its name is returned."""
    for file in sorted(folder.glob("*.safetensors")):
        state = load_file(file)
        name = next((name for name in sorted(state) if name.endswith(end)), None)
        if name is not None:
            state[name] = change(state[name])
            save_file(state, file, metadata={"format": "pt"})
            return name
    raise AssertionError(end)


def put(value, dtype=None):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(dtype or tensor.dtype).view(-1)[3] = value
        return tensor

    return change


@pytest.fixture(params=["int4", "float8", "nf4", "aqlm-1x4"])
def saved(request, tmp_path):
    """A quantized model, by its number type."""
    source = save("llama", tmp_path / "saved" / "float", torch.bfloat16)
    model = quanto_hf.load_and_quantize_model(
        source, QuantoConfig(request.param, overrides={"down_proj": {"weights": "int8"}})
    )
    model.save_pretrained(tmp_path / "saved" / "out", max_shard_size="60KB")
    return request.param, tmp_path / "saved" / "out"


@pytest.mark.filterwarnings("ignore:.*codebooks")
def test_a_sound_model_is_verified_in_every_format(saved, sharded):
    for folder in (saved[1], sharded, quanto_hf.tiny_lm()):
        result = inspect(folder, "--verify")
        assert result.exit_code == 0 and "no problems" in result.stdout, result.output
        assert as_json(folder, "--verify")["problems"] == []


@pytest.mark.filterwarnings("ignore:.*codebooks")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_one_line_each(saved, value):
    kind, folder = saved
    floats = {"int4": "weight_zero", "aqlm-1x4": "weight_codebooks"}.get(kind, "weight_scale")
    names = [changed(folder, floats, put(value))]
    if value != value:
        names.append(changed(folder, "norm.weight", put(value)))
    if kind == "float8":
        names.append(changed(folder, "up_proj.weight_packed", put(0x7F)))
    result = inspect(folder, "--verify")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert len(lines) == len(names) and all(any(line.startswith(f"{name}: 1 of ") for line in lines) for name in names)
    assert inspect(folder).exit_code == 0
    assert len(json.loads(inspect(folder, "--verify", "--json").stdout)["problems"]) == len(names)


def test_what_only_is_unusual_is_a_note(sharded):
    name = changed(sharded, "down_proj.weight_packed", put(-128))
    (sharded / "stray.safetensors").write_bytes((next(sharded.glob("model-*.safetensors"))).read_bytes())
    notes = as_json(sharded, "--verify")["notes"]
    assert any(note.startswith(f"{name}: 1 of") and "-128" in note for note in notes)
    assert "stray.safetensors is not in the index" in notes


def test_faults_that_headers_show_are_problems_of_verify_too(sharded):
    name = changed(sharded, "weight_scale", put(float("nan")))
    files = sorted(sharded.glob("*.safetensors"))
    first, second, *_ = [file for file in files if name not in load_file(file)]
    with open(second, "rb+") as file:
        file.truncate(second.stat().st_size - 8)
    result = inspect(sharded, "--verify")
    assert result.exit_code == 1
    assert second.name in result.stdout and name in result.stdout
    first.unlink()
    result = inspect(sharded, "--verify")
    assert result.exit_code == 1 and first.name in result.stdout


def test_an_empty_weight_may_stand_beside_a_packed_one_and_a_full_one_may_not(tmp_path):
    source = save("llama", tmp_path / "float", torch.bfloat16)
    quanto_hf.load_and_quantize_model(source, QuantoConfig("int8")).save_pretrained(tmp_path / "out")
    file, name = tmp_path / "out" / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    for shape, code in (((0,), 0), ((4, 4), 1)):
        save_file({**load_file(file), name: torch.zeros(shape)}, file, metadata={"format": "pt"})
        result = inspect(tmp_path / "out", "--verify")
        assert result.exit_code == code and (name in result.stdout) is bool(code)
