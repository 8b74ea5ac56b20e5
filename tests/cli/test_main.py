"""What all commands share: help, version, errors, the sentence without typer."""

import os
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import quanto_hf
from quanto_hf.cli.app import app, sentence

COMMANDS = ("demo", "quantize", "inspect", "plan", "eval", "kernels", "bench linear", "bench model")


def run(*words: str):
    return CliRunner().invoke(app, list(words))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"Example: quanto-hf {command}" in " ".join(result.stdout.replace("│", " ").split())


def test_help_names_all_commands():
    result = run("--help")
    assert result.exit_code == 0
    assert all(command.split()[0] in result.stdout for command in COMMANDS)


def test_version():
    result = run("--version")
    assert (result.exit_code, result.stdout.strip()) == (0, f"quanto-hf {quanto_hf.__version__}")


def test_wrong_usage_exits_with_2():
    assert run("inspect").exit_code == 2
    assert run("nonsense").exit_code == 2
    assert run("demo", "--nonsense").exit_code == 2


def test_an_error_is_a_sentence_on_stderr_and_exits_with_1():
    result = run("inspect", "/nowhere")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "error: /nowhere is not a model: it has no config.json\n"


def test_debug_shows_the_traceback_wherever_it_stands(done):
    result = done["debug"]
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "CheckpointError" in result.stderr


def test_as_a_module_without_debug_there_is_no_traceback(done):
    result = done["no debug"]
    assert (result.returncode, result.stderr) == (1, "error: /nowhere is not a model: it has no config.json\n")


@pytest.mark.parametrize("word", ["kernels", "--version"])
def test_a_level_of_instructions_that_there_is_not_is_one_sentence(word, done):
    result = done[f"no such level: {word}"]
    (line,) = result.stderr.splitlines()
    assert (result.returncode, result.stdout) == (2, "")
    assert line.startswith("error: QUANTO_HF_CPU='nonsense' is not a level") and line.endswith("torch")


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_without_typer_or_rich_one_sentence_says_what_to_install(module, done):
    result = done[f"without {module}"]
    assert result.returncode == 1
    assert result.stderr == 'the command line needs typer and rich: pip install "quanto-hf[cli]"\n'


def test_sentences():
    assert sentence(ValueError("two\n  lines")) == "two\n  lines"
    assert sentence(PermissionError(13, "Permission denied", "/x")) == "/x: Permission denied"
    assert sentence(RuntimeError("first\nsecond")) == "RuntimeError: first (--debug shows where)"


def test_the_commands_of_the_guide_run(tmp_path, monkeypatch):
    guide = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", guide, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for line in "".join(blocks).splitlines():
        words = shlex.split(line.replace("$MODEL", quanto_hf.tiny_lm()))
        result = run(*words[1:])
        assert (words[0], result.exit_code) == ("quanto-hf", 0), (line, result.stderr)
    assert sorted(os.listdir(tmp_path)) == ["demo.png", "layers.png", "out-int4"]
