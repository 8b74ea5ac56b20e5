"""The plot of a comparison; needs matplotlib."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from quanto_hf.io.safe_files import replacing

if TYPE_CHECKING:
    from quanto_hf.flow.comparison import Comparison

# with more layers than this, names would lie over each other
MOST_NAMES = 60


def draw_layers(file: Path, comparisons: "Mapping[str, Comparison]") -> None:
    """SQNR of each layer: bars for the own error, a line for the accumulated one. One plot below the other.

    Args:
        file: a PNG file. It is replaced when the plot is finished.
        comparisons: title -> comparison.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    most = max((len(comparison.rows) for comparison in comparisons.values()), default=0)
    width = min(max(6.0, 0.22 * most), 40.0)
    figure = Figure(figsize=(width, 4.2 * max(len(comparisons), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (title, comparison) in enumerate(comparisons.items(), start=1):
        axes = figure.add_subplot(len(comparisons), 1, number)
        rows = comparison.rows
        heights = {by: [_finite(row.errors(by)) for row in rows] for by in ("own", "accumulated")}
        axes.bar(range(len(rows)), heights["own"], color="#9ecae1", label="own error")
        axes.plot(
            range(len(rows)), heights["accumulated"], "o-", color="#d94801", ms=3, lw=1, label="accumulated error"
        )
        step = max(1, math.ceil(len(rows) / MOST_NAMES))
        axes.set_xticks(range(0, len(rows), step), [row.name for row in rows[::step]], rotation=90, fontsize=6)
        axes.set_ylabel("SQNR (dB, higher is better)")
        axes.set_title(title, fontsize=9, loc="left")
        axes.margins(x=0.01)
        axes.grid(axis="y", alpha=0.3)
        # above the plot, where it covers no bar
        axes.legend(fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    with replacing(file) as part:
        figure.savefig(part, dpi=150, format="png")


def _finite(errors: object) -> float:
    """A height: NaN, which is no bar, where there is no number."""
    value = getattr(errors, "sqnr", math.nan)
    return value if math.isfinite(value) else math.nan
