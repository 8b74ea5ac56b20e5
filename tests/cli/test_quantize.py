"""quanto-hf quantize: the command around convert_checkpoint."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny_models import lively, llama_config, save
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from typer.testing import CliRunner

import quanto_hf
from quanto_hf.cli.app import app
from quanto_hf.cli.quantize import parse_overrides


def quantize(*words: object):
    return CliRunner().invoke(app, ["quantize", *map(str, words)])


def test_all_options_and_the_summary(tmp_path):
    out = tmp_path / "out"
    options = "--weights int4 --group-size 32 --symmetric --fit mse --exclude up_proj --dtype float32"
    result = quantize(
        *(quanto_hf.tiny_lm(), out, *options.split()),
        *("--override", "*.down_proj=int8", "--override", "q_proj=float", "--max-shard-size", "500KB"),
    )
    assert result.exit_code == 0, result.stderr
    model = AutoModelForCausalLM.from_pretrained(out)
    layer = model.model.layers[0]
    assert [str(m.scheme) for m in (layer.self_attn.k_proj, layer.mlp.down_proj)] == ["int4 g32", "int8"]
    assert type(layer.mlp.up_proj) is type(layer.self_attn.q_proj) is torch.nn.Linear
    assert model.dtype == torch.float32
    for said in ("bits per weight", "MB ->", "an override leaves", "'up_proj'"):
        assert said in result.stdout
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "- quanto_hf" in card and "pip install quanto-hf" in card and "| int4 g32 |" in card
    (out / "README.md").write_text("mine")
    again = quantize(
        *(quanto_hf.tiny_lm(), out, *options.split()),
        *("--override", "*.down_proj=int8", "--override", "q_proj=float", "--max-shard-size", "500KB"),
    )
    assert again.exit_code == 0 and "was complete already" in again.stdout
    assert (out / "README.md").read_text() == "mine"


def test_overrides():
    assert parse_overrides(["*.a=int8", "b=c=float"]) == {"*.a": {"weights": "int8"}, "b=c": {"weights": None}}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--weights", "int3"], "weights='int3'; choose one of"),
        (["--weights", "nf4", "--asymmetric"], "nf4 weights are symmetric"),
        (["--group-size", "7"], "group_size=7; choose one of"),
        (["--fit", "luck"], "fit='luck'; choose one of"),
        (["--override", "int8"], "is not PATTERN=TYPE"),
        (["--override", "a=int3"], "weights='int3'"),
        (["--dtype", "int8"], "dtype='int8' is not known"),
        (["--max-shard-size", "much"], "max_shard_size='much' is not a size"),
    ],
)
def test_wrong_values_write_nothing(options, said, tmp_path):
    result = quantize(quanto_hf.tiny_lm(), tmp_path / "out", *options)
    assert result.exit_code == 1
    assert said in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    result = quantize(quanto_hf.tiny_lm(), tmp_path / "file" / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_output(tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in quantize(quanto_hf.tiny_lm(), tmp_path / "out").stderr


def test_an_occupied_output(tmp_path):
    (tmp_path / "mine").write_text("")
    result = quantize(quanto_hf.tiny_lm(), tmp_path)
    assert result.exit_code == 1 and "holds files that this conversion did not write: mine" in result.stderr
    assert os.listdir(tmp_path) == ["mine"]


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "no/where/at/all"])
def test_a_model_that_is_nowhere(name, tmp_path):
    result = quantize(name, tmp_path / "out")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1


def test_a_pattern_that_matches_nothing_is_told(tmp_path):
    source = save("llama", tmp_path / "float")
    result = quantize(source, tmp_path / "out", "--exclude", "q_prj")
    assert result.exit_code == 0
    assert "warning: the pattern 'q_prj' matches no module" in result.stderr and "q_proj" in result.stderr


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_killed_in_the_middle_and_resumed_gives_the_same_bytes(tied, tmp_path):
    source = tmp_path / "float"
    config = llama_config(num_hidden_layers=12, hidden_size=256, intermediate_size=1024, tie_word_embeddings=tied)
    lively(LlamaForCausalLM(config)).save_pretrained(source, max_shard_size="4MB")
    options = ["--weights", "int4", "--max-shard-size", "300KB"]
    out, whole = tmp_path / "out", tmp_path / "whole"
    command = [sys.executable, "-m", "quanto_hf", "quantize", str(source), str(out), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.safetensors"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "config.json").exists() and not (out / "model.safetensors.index.json").exists()
    finished = {file.name: file.stat().st_mtime_ns for file in out.glob("model-*.safetensors")}
    result = quantize(source, out, *options)
    assert result.exit_code == 0, result.stderr
    assert "of a former run were checked and kept" in result.stdout
    assert sum((out / name).stat().st_mtime_ns == then for name, then in finished.items()) >= 2
    assert quantize(source, whole, *options).exit_code == 0
    assert sorted(os.listdir(out)) == sorted(os.listdir(whole))
    for name in os.listdir(whole):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert AutoModelForCausalLM.from_pretrained(out).model.layers[3].mlp.up_proj.is_frozen
