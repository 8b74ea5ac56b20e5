"""The demo, on two types and a short text."""

import sys

import pytest
from typer.testing import CliRunner

import quanto_hf
from quanto_hf.cli.app import app


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(quanto_hf.heldout_text()[:2500])
    return file


def demo(*words: object):
    return CliRunner().invoke(app, ["demo", *map(str, words)])


def test_two_types_with_a_plot(text, tmp_path):
    plot = tmp_path / "plot.png"
    result = demo("--weights", "int8", "--weights", "int4", "--text", text, "--plot", plot)
    assert result.exit_code == 0, result.stderr
    rows = {line.split("│")[1].strip(): line.split("│") for line in result.stdout.splitlines() if line.startswith("│")}
    assert list(rows) == ["float (bfloat16)", "int8", "int4"]
    bits = [float(cells[2]) for cells in rows.values()]
    assert bits[0] == 16 and 8 < bits[1] < 8.5 and bits[2] == 4.5
    assert rows["int4"][6].strip().endswith("%") and float(rows["int4"][7]) > float(rows["int8"][7]) > 0
    assert "bit-equal" in result.stdout
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_row_with_embeddings_takes_less(text):
    result = demo("--weights", "int4", "--embeddings", "int8", "--text", text)
    assert result.exit_code == 0, result.stderr
    rows = {line.split("│")[1].strip(): line.split("│") for line in result.stdout.splitlines() if line.startswith("│")}
    alone, both = rows["int4"], rows["int4, embeddings int8"]
    assert float(both[3].split()[0]) < float(alone[3].split()[0]) and float(both[7]) < 2 * float(alone[7])


def test_a_wrong_type_is_told_before_anything_is_loaded():
    result = demo("--weights", "int3")
    assert result.exit_code == 1
    assert "weights='int3'; choose one of" in result.stderr


def test_a_text_that_is_too_short(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Return the")
    result = demo("--weights", "int8", "--text", short)
    assert result.exit_code == 1
    assert "one window takes 256" in result.stderr


def test_a_text_that_is_not_there_or_not_text(tmp_path):
    assert "cannot be read" in demo("--text", tmp_path / "none.txt").stderr
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    assert "is not UTF-8" in demo("--text", tmp_path / "bytes").stderr


def test_plot_without_matplotlib_says_so_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = demo("--plot", tmp_path / "p.png")
    assert (result.exit_code, result.stderr) == (1, 'error: --plot needs matplotlib: pip install "quanto-hf[cli]"\n')


@pytest.mark.parametrize(("name", "said"), [("p.txt", "does not end in .png"), ("no/p.png", "does not exist")])
def test_a_plot_file_that_cannot_be(tmp_path, name, said):
    assert said in demo("--plot", tmp_path / name).stderr
