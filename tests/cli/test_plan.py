"""quanto-hf plan."""

import json
import shutil

import pytest
from typer.testing import CliRunner

import quanto_hf
from quanto_hf import QuantoConfig
from quanto_hf.cli.app import app

TINY = quanto_hf.tiny_lm()


def run(*words: object):
    return CliRunner().invoke(app, ["plan", *map(str, words)])


def test_the_json_is_that_of_the_function():
    result = run(TINY, "--weights", "int4", "--max-memory", "16MiB", "--context", 100, "--batch", 2, "--json")
    assert result.exit_code == 0, result.stderr
    wanted = quanto_hf.plan(TINY, QuantoConfig("int4"), "16MiB", context=100, batch=2)
    assert json.loads(result.stdout) == json.loads(json.dumps(wanted.to_dict()))


def test_a_model_that_fits():
    result = run(TINY, "--weights", "int4", "--max-memory", "16MiB")
    assert result.exit_code == 0
    for words in ("device 0", "at load", "left in float", "largest layer", "KV cache of 1 x 4096", "It fits."):
        assert words in result.stdout


def test_a_model_that_does_not_fit_exits_with_1_and_says_what_would():
    result = run(TINY, "--max-memory", "cpu=3500kB", "--device-map", "auto", "--context", 0)
    assert result.exit_code == 1 and result.stderr == ""
    assert "It does not fit" in result.stdout and "It would with weights: int4, int2" in result.stdout
    assert "spilled" in result.stdout


def test_devices_overrides_and_skips():
    words = ("--max-memory", "0=9MiB,cpu=1GiB", "--max-memory", "1=16MiB", "--context", 0, "--json")
    more = ("--weights", "int4", "--override", "*.down_proj=int8", "--exclude", "q_proj", "--group-size", 32)
    found = json.loads(run(TINY, *words, *more).stdout)
    config = QuantoConfig(
        "int4", group_size=32, overrides={"*.down_proj": {"weights": "int8"}}, modules_to_not_convert=["q_proj"]
    )
    wanted = quanto_hf.plan(TINY, config, {0: "9MiB", "cpu": "1GiB", 1: "16MiB"}, context=0)
    assert found == json.loads(json.dumps(wanted.to_dict()))
    assert any("q_proj" in item["reason"] for item in found["left_in_float"])


def test_a_quantized_folder_needs_no_weights(tmp_path):
    model = quanto_hf.load_and_quantize_model(TINY, QuantoConfig("int2"))
    model.save_pretrained(tmp_path)
    result = run(tmp_path, "--max-memory", "3MiB", "--context", 0)
    assert result.exit_code == 0, result.stderr
    assert "int2 (quantized)" in result.stdout and "at load" in result.stdout


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--max-memory", "lots"), 1, "'lots' is not a size"),
        (("--max-memory", "0=1GiB,2GiB"), 2, "is not DEVICE=SIZE"),
        (("--max-memory", "gpu=1GiB"), 1, "the device 'gpu'"),
        (("--weights", "int3"), 1, "weights='int3'; choose one of"),
        (("--dtype", "int8"), 2, "--dtype int8 is not known"),
        (("--device-map", "nowhere"), 1, "device_map='nowhere' is not known"),
        (("--context", "-1"), 2, "context"),
    ],
    ids=["size", "no device", "device", "weights", "dtype", "map", "context"],
)
def test_a_wrong_word_is_a_sentence(words, code, said):
    result = run(TINY, *words)
    assert result.exit_code == code and said in result.stderr and result.stdout == ""


def test_what_is_not_a_model_is_a_sentence(tmp_path):
    result = run(tmp_path)
    assert result.exit_code == 1
    assert result.stderr == f"error: {tmp_path} is not a model: it has no config.json\n"


def test_the_arguments_of_from_pretrained_reach_the_plan(tmp_path):
    shutil.copytree(TINY, tmp_path / "part")
    result = run(tmp_path, "--subfolder", "part", "--weights", "int4", "--max-memory", "16MiB", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["nbytes"] == quanto_hf.plan(TINY, QuantoConfig("int4"), "16MiB").nbytes
    words = ("--revision", "v1", "--cache-dir", tmp_path / "cache", "--local-files-only", "--trust-remote-code")
    result = run("team/model", *words)
    assert result.exit_code == 1 and "local_files_only=True" in result.stderr
