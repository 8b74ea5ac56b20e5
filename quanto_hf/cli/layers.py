"""The table of ``eval --layers``."""

from typing import Any

from rich.table import Table

from quanto_hf.cli.show import table

# of SQNR, cosine and largest error
FORMS = (".2f", ".5f", ".3g")


def layer_table(name: str, comparison: Any) -> Table:
    """A row per layer of a :class:`quanto_hf.flow.Comparison`; the three layers that add most are marked."""
    shown = table(
        f"{name}: SQNR in dB (higher is better), cosine and largest error of each layer; * adds most",
        ["layer", "stored"],
        ["own", "cosine", "max", "accumulated", "cosine", "max", "weight", "at ends", "clipped"],
        ["note"],
    )
    worst = {row.name for row in comparison.worst(3)}
    for row in comparison.rows:
        cells = []
        for errors in (row.errors("own"), row.errors("accumulated")):
            found = ("", "", "") if errors is None else (errors.sqnr, errors.cosine, errors.largest)
            cells += ["" if value == "" else f"{value:{form}}" for value, form in zip(found, FORMS, strict=True)]
        if row.name in worst:
            cells[0] = f"* {cells[0]}"
        weight = "" if row.weight is None else f"{row.weight:.4f}"
        shares = ["" if share is None else f"{100 * share:.2f}%" for share in (row.ends, row.clipping.value)]
        shown.add_row(row.name, row.stored, *cells, weight, *shares, row.note)
    return shown
