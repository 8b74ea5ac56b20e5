"""The plots of ``demo`` and ``eval``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quanto_hf.flow.layer_plot import draw_layers

__all__ = ["check_plot", "draw", "draw_layers"]


def check_plot(file: Path) -> None:
    """Say at once, not after the work, that a plot cannot be drawn.

    Raises:
        ValueError: matplotlib is missing, or the folder of the file is.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError('--plot needs matplotlib: pip install "quanto-hf[cli]"') from None
    if file.suffix.lower() != ".png":
        raise ValueError(f"--plot writes a PNG file, but {file} does not end in .png")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"the folder of {file} does not exist")


def draw(file: Path, rows: Sequence[Any]) -> None:
    """Bytes on disk against perplexity, a labelled point for each row of the demo."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    labels: dict[int, list[str]] = {}
    for row in sorted(rows, key=lambda row: -row.perplexity):
        axes.plot(row.disk / 1e6, row.perplexity, "o")
        # types of the same size and nearly the same perplexity: their names below each other
        near = labels.setdefault(round(20 * row.disk / max(row.disk for row in rows)), [])
        offset = (7, 14 - 13 * len(near))
        axes.annotate(row.name, (row.disk / 1e6, row.perplexity), xytext=offset, textcoords="offset points")
        near.append(row.name)
    axes.set_xlabel("weights on disk (MB)")
    axes.set_ylabel("perplexity (lower is better)")
    if max(row.perplexity for row in rows) > 2 * min(row.perplexity for row in rows):
        # one bad type would press all others into a line
        axes.set_yscale("log")
        for axis_format in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis_format("{x:g}")
    axes.margins(x=0.3, y=0.15)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
