"""The plot of a comparison."""

import math

import pytest

pytest.importorskip("matplotlib")

import matplotlib.figure

from quanto_hf.flow.comparison import Comparison, LayerRow
from quanto_hf.flow.errors import Errors
from quanto_hf.flow.layer_plot import MOST_NAMES, draw_layers


def errors(sqnr: float) -> Errors:
    return Errors(wanted=10 ** (sqnr / 10), made=1, error=1 if math.isfinite(sqnr) else 0, count=1)


def comparison(*pairs):
    rows = [
        LayerRow(f"layers.{n}", "int8", errors(accumulated), errors(own)) for n, (own, accumulated) in enumerate(pairs)
    ]
    return Comparison(rows)


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is written."""
    made = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda self, *args, **kwargs: (made.append(self), save(self, *args, **kwargs)),
    )
    return made


def test_bars_are_own_errors_and_the_line_is_the_accumulated_one(tmp_path, figures):
    comparison((30, 30), (20, 18), (25, 17)).plot(tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([30, 20, 25])
    assert list(axes.lines[0].get_ydata()) == pytest.approx([30, 18, 17])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["layers.0", "layers.1", "layers.2"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_an_exact_layer_a_missing_one_and_a_nan_are_gaps(tmp_path, figures):
    made = comparison((math.inf, 20), (10, 5))
    made.rows[1].own = None
    made.rows[1].accumulated = Errors(wanted=1, error=math.nan, count=1)
    made.plot(tmp_path / "a.png")
    assert all(math.isnan(bar.get_height()) for bar in figures[0].axes[0].patches)
    assert math.isnan(figures[0].axes[0].lines[0].get_ydata()[1])


def test_a_plot_for_each_comparison_and_some_names_of_many_layers(tmp_path, figures):
    draw_layers(tmp_path / "a.png", {"int8": comparison((1, 2)), "int4": comparison(*[(3, 2)] * 500)})
    assert [axes.get_title(loc="left") for axes in figures[0].axes] == ["int8", "int4"]
    assert len(figures[0].axes[1].patches) == 500 and len(figures[0].axes[1].get_xticks()) <= MOST_NAMES


def test_a_plot_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    comparison((1, 2)).plot(file)
    before = file.read_bytes()

    def fail(self, part, **kwargs):
        part.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space"):
        comparison((1, 2)).plot(file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
