"""What :func:`quanto_hf.flow.compare` found: a row for each layer, as a table, a dictionary or a plot."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quanto_hf.flow.errors import Errors, Share

MEASURES = ("own", "accumulated")


@dataclass
class LayerRow:
    """One quantized layer, or a module that contains some.

    Args:
        name: as in the model; empty for the model itself.
        stored: how the weight is stored, or the type of the module.
        accumulated: error of the output in the running quantized model, against the running float model.
        own: error of the output for the input of the float model: what this layer alone adds. Layers only.
        weight: ||Q - W|| / ||W|| of the weight; None where there is none.
        ends: share of weight codes that are the smallest or the largest there is.
        clipping: values of the input, in the running quantized model, that the quantizer of activations clips.
        note: why a measure is missing.
    """

    name: str
    stored: str
    accumulated: Errors = field(default_factory=Errors)
    own: Errors | None = None
    weight: float | None = None
    ends: float | None = None
    clipping: Share = field(default_factory=Share)
    note: str = ""

    def errors(self, by: str) -> Errors | None:
        """The errors of a name in ``MEASURES``; None where nothing was measured."""
        found = self.own if by == "own" else self.accumulated
        return found if found is not None and found.count else None

    def to_dict(self) -> dict[str, Any]:
        """The measures in JSON types; what is missing or not finite is None."""
        made: dict[str, Any] = {"name": self.name, "stored": self.stored}
        for by in MEASURES:
            errors = self.errors(by)
            for key in ("sqnr", "cosine", "relative", "largest"):
                value = None if errors is None else getattr(errors, key)
                made[f"{by}_{key}"] = value if value is not None and math.isfinite(value) else None
        return {**made, "weight": self.weight, "ends": self.ends, "clipped": self.clipping.value, "note": self.note}


@dataclass
class Comparison:
    """One row per layer, in the order of the model. ``str(comparison)`` is a table."""

    rows: list[LayerRow]

    def worst(self, n: int = 5, by: str = "own") -> list[LayerRow]:
        """The ``n`` layers with the lowest SQNR, the lowest first. What is not a number comes before all.

        Args:
            n: how many; fewer if there are not as many.
            by: "own", what each layer adds, or "accumulated", what has come together up to it.

        Raises:
            ValueError: ``by`` is neither.
        """
        if by not in MEASURES:
            raise ValueError(f"by={by!r} is not a measure; choose {' or '.join(map(repr, MEASURES))}")
        found = [(errors.sqnr, row) for row in self.rows if (errors := row.errors(by)) is not None]
        return [row for _, row in sorted(found, key=lambda pair: -math.inf if math.isnan(pair[0]) else pair[0])[:n]]

    def to_dict(self) -> dict[str, Any]:
        """``{"layers": [...]}`` in JSON types."""
        return {"layers": [row.to_dict() for row in self.rows]}

    def plot(self, path: str | Path) -> None:
        """Draw the SQNR of each layer, own and accumulated, into a PNG file.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from quanto_hf.flow.layer_plot import draw_layers

        draw_layers(Path(path), {"": self})

    def __str__(self) -> str:
        width = max((len(_shown(row)) for row in self.rows), default=5)
        stored = max((len(row.stored) for row in self.rows), default=6)
        titles = f"{'SQNR dB':>8} {'cosine':>8} {'max':>9}"
        shares = f"{'weight':>7} {'at ends':>7} {'clipped':>7}"
        lines = [
            f"{'':{width}}  {'':{stored}}  {'own error':^27}  {'accumulated error':^27}",
            f"{'layer':{width}}  {'stored':{stored}}  {titles}  {titles}  {shares}  note",
        ]
        for row in self.rows:
            cells = [_measures(row.errors(by)) for by in MEASURES]
            ends, clips = _percent(row.ends), _percent(row.clipping.value)
            weight = "" if row.weight is None else f"{row.weight:.4f}"
            line = f"{_shown(row):{width}}  {row.stored:{stored}}  {cells[0]}  {cells[1]}"
            lines.append(f"{line}  {weight:>7} {ends:>7} {clips:>7}  {row.note}".rstrip())
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Comparison({len(self.rows)} rows)"


def _shown(row: LayerRow) -> str:
    return row.name or "(the model)"


def _measures(errors: Errors | None) -> str:
    return " " * 27 if errors is None else f"{errors.sqnr:8.2f} {errors.cosine:8.5f} {errors.largest:9.3g}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}%"
