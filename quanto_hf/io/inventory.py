"""What a saved model holds, by its config.json and the headers of its safetensors files."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from quanto_hf.io.checkpoint import CheckpointError, read_headers
from quanto_hf.io.format import check_version, read_modules
from quanto_hf.schemes import Scheme, TensorSpec

INDEX = "model.safetensors.index.json"
PREFIX = "weight_"


@dataclass(frozen=True)
class Item:
    """One weight, or several that are stored alike.

    Args:
        name: of the float weight; empty for several.
        stored: the scheme, or the dtype.
        parameters: elements of the float weight.
        nbytes: as stored, scales and zeros included.
        count: number of weights.
    """

    name: str
    stored: str
    parameters: int
    nbytes: int
    count: int = 1

    @property
    def bits(self) -> float:
        """Per element."""
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Inventory:
    """Every weight of a saved model. ``format_version`` is None for a model that quanto_hf did not quantize."""

    rows: list[Item]
    format_version: int | None
    files: int

    def grouped(self) -> list[Item]:
        """One item for each way to store, the largest first."""
        kinds = {row.stored: [r for r in self.rows if r.stored == row.stored] for row in self.rows}
        return sorted((_sum(rows, kind) for kind, rows in kinds.items()), key=lambda item: -item.nbytes)

    def total(self) -> Item:
        """All of them."""
        return _sum(self.rows, "")

    def to_dict(self, every: bool = False) -> dict[str, Any]:
        """In JSON types, with one entry per weight if ``every``."""
        rows = self.rows if every else self.grouped()
        keys = ("name", "stored", "parameters", "bits", "nbytes") if every else _GROUP_KEYS
        return {
            "format_version": self.format_version,
            "files": self.files,
            "rows": [_pick(row, keys) for row in rows],
            "total": _pick(self.total(), ("count", "parameters", "bits", "nbytes")),
        }


_GROUP_KEYS = ("stored", "count", "parameters", "bits", "nbytes")


def _pick(item: Item, keys: tuple[str, ...]) -> dict[str, Any]:
    values = {**asdict(item), "bits": round(item.bits, 4)}
    return {key: values[key] for key in keys}


def _sum(rows: list[Item], stored: str) -> Item:
    return Item("", stored, sum(r.parameters for r in rows), sum(r.nbytes for r in rows), len(rows))


def read_inventory(folder: Path) -> Inventory:
    """Read a saved model; the data of no tensor is read.

    Raises:
        CheckpointError: the folder is no model, a file is missing or damaged, or tensors are missing, unexpected or
            wrong; all of them are named.
    """
    config = _read_json(folder / "config.json", f"{folder} is not a model: it has no config.json")
    files, headers = _read_files(folder)
    quantization = config.get("quantization_config") or {}
    schemes: dict[str, Scheme] = {}
    version = None
    if quantization.get("quant_method") == "quanto_hf":
        version = quantization.get("format_version")
        check_version(version)
        schemes = read_modules(quantization.get("schemes") or [])
    rows, problems = [], []
    stored = _by_module(headers, schemes)
    for module, scheme in schemes.items():
        row, found = _quantized(module, scheme, stored.pop(module, {}))
        problems += found
        rows.append(row)
    taken = {f"{module}.{PREFIX}" for module in schemes}
    for name, spec in headers.items():
        if not any(name == prefix + leaf for prefix, leaf in _split(name) if prefix in taken):
            rows.append(Item(name, _text(spec.dtype), prod(spec.shape), _nbytes(spec)))
    if problems:
        raise CheckpointError(f"{folder} is not what its config says:\n  " + "\n  ".join(sorted(problems)))
    return Inventory(rows, version, len(files))
