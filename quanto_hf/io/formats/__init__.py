"""The formats of saved models, by the method in their config.json."""

from collections.abc import Mapping
from typing import Any

from quanto_hf.io.formats.aqlm import AqlmFormat
from quanto_hf.io.formats.base import Format
from quanto_hf.io.formats.quanto import QuantoFormat
from quanto_hf.nn import QuantizedWeight

AQLM, QUANTO = AqlmFormat(), QuantoFormat()
FORMATS: dict[str, Format] = {format.method: format for format in (QUANTO, AQLM)}


def format_of(config: Mapping[str, Any]) -> Format | None:
    """The format that a quantization config names, or None."""
    method = config.get("quant_method")
    return FORMATS.get(method) if isinstance(method, str) else None


def format_of_layer(layer: QuantizedWeight) -> Format:
    """The format whose layers are of this class; ours for all others."""
    return next((f for f in FORMATS.values() if f.layer is not None and isinstance(layer, f.layer)), QUANTO)


__all__ = ["AQLM", "FORMATS", "QUANTO", "Format", "format_of", "format_of_layer"]
