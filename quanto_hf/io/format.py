"""The part of config.json that says how each module of a saved model is stored."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from quanto_hf.nn import QuantizedWeight
from quanto_hf.schemes import Scheme, scheme_from_dict

# Version 0 has the same bytes: it was provisional until the layout was measured (docs/format.md, "Why this layout").
FORMAT_VERSION = 1


def check_version(version: Any) -> None:
    """Raise ValueError if a checkpoint of this format version cannot be read."""
    if not isinstance(version, int) or isinstance(version, bool) or not 0 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"format_version={version!r} cannot be read: this version of quanto_hf reads 0 to {FORMAT_VERSION}; "
            f"install a newer quanto_hf"
        )


def describe_modules(model: nn.Module) -> list[dict[str, Any]]:
    """The resolved scheme of each quantized module, one entry per scheme: ``{"scheme": {...}, "modules": [...]}``."""
    entries: dict[Scheme, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            entries.setdefault(module.scheme, []).append(name)
    return [{"scheme": scheme.to_dict(), "modules": names} for scheme, names in entries.items()]


def read_modules(entries: Any) -> dict[str, Scheme]:
    """Module name -> scheme, from what :func:`describe_modules` wrote.

    Raises:
        ValueError: an entry is malformed, or names a module twice.
    """
    schemes: dict[str, Scheme] = {}
    if not isinstance(entries, list | tuple):
        raise ValueError(
            f"'schemes' is a list, each entry of which has the keys 'scheme' and 'modules', not {entries!r}"
        )
    for entry in entries:
        if not _is_entry(entry):
            raise ValueError(
                f"an entry of 'schemes' has the keys 'scheme' and 'modules', a dict and a list of names, "
                f"but this one is {entry!r}"
            )
        try:
            scheme = scheme_from_dict(dict(entry["scheme"]))
        except ValueError as reason:
            raise ValueError(f"'schemes' has an entry whose scheme cannot be read: {reason}") from None
        for name in entry["modules"]:
            if name in schemes:
                raise ValueError(f"'schemes' names the module {name!r} twice")
            schemes[name] = scheme
    return schemes


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, Mapping)
        and set(entry) == {"scheme", "modules"}
        and isinstance(entry["scheme"], Mapping)
        and isinstance(entry["modules"], list)
        and all(isinstance(name, str) for name in entry["modules"])
    )
