"""quanto-hf eval."""

import pytest
from typer.testing import CliRunner

import quanto_hf
from quanto_hf import QuantoConfig
from quanto_hf.cli.app import app
from quanto_hf.hf.convert.convert import convert_checkpoint


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
    live = numbers(evaluate(quanto_hf.tiny_lm(), "--weights", "int4,int8"))
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


def test_the_errors_of_the_layers_are_told_and_drawn(int4, tmp_path):
    plot = tmp_path / "layers.png"
    words = ["--weights", "int4", "--weights", "int8", "--layers", "--plot", str(plot)]
    rows = numbers(evaluate(quanto_hf.tiny_lm(), *words))[3:]
    assert len(rows) == 2 * 14 and [row[1] for row in rows[::14]] == ["int4 g64 asym", "int8"]
    assert rows[0][0] == rows[14][0] == "model.layers.0.self_attn.q_proj"
    own, accumulated = ([float(row[n].lstrip("* ")) for row in rows] for n in (2, 5))
    # the first layer has exact inputs; int8 is better everywhere
    assert own[0] == accumulated[0] and all(more > less + 10 for less, more in zip(own[:14], own[14:], strict=True))
    worst = [row[2].startswith("*") for row in rows[:14]]
    assert sum(worst) == 3 and worst[own.index(min(own))]
    assert plot.read_bytes().startswith(b"\x89PNG") and [file.name for file in tmp_path.iterdir()] == ["layers.png"]
    saved = numbers(evaluate(int4, "--reference", quanto_hf.tiny_lm(), "--layers"))[2:]
    assert [row[2:7] for row in saved] == [row[2:7] for row in rows[:14]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layers"], "give --reference, or --weights"),
        (["--weights", "int8", "--plot", "a.png"], "--plot draws what --layers measures"),
        (["--weights", "int8", "--layers", "--plot", "a.pdf"], "does not end in .png"),
    ],
)
def test_layers_that_cannot_be_compared(words, said):
    result = evaluate(quanto_hf.tiny_lm(), *words)
    assert result.exit_code == 1
    assert said in result.stderr
