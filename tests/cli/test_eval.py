"""quanto-hf eval."""

import pytest
from typer.testing import CliRunner

import quanto_hf
from quanto_hf import QuantoConfig
from quanto_hf.cli.app import app
from quanto_hf.hf.convert import convert_checkpoint


@pytest.fixture(scope="module")
def int4(tmp_path_factory):
    out = tmp_path_factory.mktemp("eval") / "int4"
    convert_checkpoint(quanto_hf.tiny_lm(), out, QuantoConfig(weights="int4"))
    return str(out)


def evaluate(*words: str):
    return CliRunner().invoke(app, ["eval", *words, "--length", "64", "--limit-windows", "4"])


def numbers(result) -> list[list[str]]:
    assert result.exit_code == 0, result.stderr
    lines = [line.split("│") for line in result.stdout.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line[1:-1]] for line in lines]


def test_a_saved_model_against_its_float_one_is_what_loading_quantized_is(int4):
    saved = numbers(evaluate(int4, "--reference", quanto_hf.tiny_lm()))
    live = numbers(evaluate(quanto_hf.tiny_lm(), "--weights", "int4", "--weights", "int8"))
    assert saved[1][1:] == live[1][1:]
    assert float(live[1][3]) > float(live[2][3]) > 0


def test_without_a_reference_there_is_perplexity_only(int4):
    result = evaluate(int4)
    ((_, perplexity, change, kl),) = numbers(result)
    assert 1 < float(perplexity) < 100 and (change, kl) == ("", "")
    assert "252 tokens" in result.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--weights", "int8"], "is quantized already"),
        (["--reference", "", "--weights", "int8"], "give --reference or --weights"),
        (["--text", "/nowhere"], "cannot be read"),
    ],
)
def test_what_cannot_be(int4, words, said):
    result = evaluate(int4, *words)
    assert result.exit_code == 1
    assert said in result.stderr


def test_a_quantized_reference_and_a_model_that_is_nowhere(int4):
    assert "--reference is the float model" in evaluate(int4, "--reference", int4).stderr
    assert "is not a folder with a model" in evaluate("./nowhere").stderr


def test_a_window_longer_than_the_model_reads():
    result = CliRunner().invoke(app, ["eval", quanto_hf.tiny_lm(), "--length", "100000"])
    assert result.exit_code == 1
    assert "is more than the 512 tokens" in result.stderr
