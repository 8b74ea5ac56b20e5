"""Our own format (docs/format.md): config.json says how each module is stored, and files have guards."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from quanto_hf.io.formats.base import Format
from quanto_hf.nn import QuantizedWeight
from quanto_hf.nn.slots import joined
from quanto_hf.schemes import Scheme, TensorSpec, scheme_from_dict

# Version 2 has guards. Version 0 has the bytes of version 1: it was provisional until the layout was measured
# (docs/format.md, "Why this layout").
FORMAT_VERSION = 2

# the key for the version in the metadata of each file
VERSION_KEY = "quanto_hf_format"

# Shape of the empty tensor under the name of the float weight. transformers without quanto_hf has a place for this
# name, and raises because of the shape; without it, it would draw random weights and go on.
GUARD_SHAPE = (0,)
# what the names of packed weights end in
PACKED = ("_packed", "weight_codes")


def guards_for(specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Guard -> packed weight, by name, for a file with these tensors."""
    return {name.rpartition("_")[0]: name for name, spec in specs.items() if name.endswith(PACKED) and _is_codes(spec)}


def _is_codes(spec: TensorSpec) -> bool:
    # a dtype that torch does not have is the name that the file has for it
    return isinstance(spec.dtype, torch.dtype) and not spec.dtype.is_floating_point


def find_guards(headers: Mapping[str, TensorSpec]) -> list[str]:
    """Names of the guards among the tensors of a checkpoint; also of those whose packed weight is missing or wrong."""
    beside = {name.rpartition("_")[0] for name in headers}
    return [name for name, spec in headers.items() if tuple(spec.shape) == GUARD_SHAPE and name in beside]


def without_guards(headers: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The tensors of a checkpoint that hold something."""
    guards = set(find_guards(headers))
    return {name: spec for name, spec in headers.items() if name not in guards}


def check_version(version: Any) -> None:
    """Raise ValueError if a checkpoint of this format version cannot be read."""
    if not isinstance(version, int) or isinstance(version, bool) or not 0 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"format_version={version!r} cannot be read: this version of quanto_hf reads 0 to {FORMAT_VERSION}; "
            f"install a newer quanto_hf"
        )


def describe_modules(model: nn.Module) -> list[dict[str, Any]]:
    """The resolved scheme of each quantized module, one entry per scheme: ``{"scheme": {...}, "modules": [...]}``. Of
    modules with one weight that is named under which the files have it."""
    entries: dict[Scheme, list[str]] = {}
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            for slot in module.slots:
                scheme = module.scheme_of(slot)
                if slot.full(name) not in tied and joined(name, slot.names(scheme)[0]) not in tied:
                    entries.setdefault(scheme, []).append(slot.label(name))
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


class QuantoFormat(Format):
    """The format of ``quanto_hf`` checkpoints."""

    method: ClassVar[str] = "quanto_hf"
    keys: ClassVar[frozenset[str]] = frozenset({"schemes", "format_version"})
    guarded: ClassVar[bool] = True

    def version(self, config: Mapping[str, Any]) -> int:
        version = config.get("format_version")
        check_version(version)
        assert isinstance(version, int)
        return version

    def refuses_saved(self, config: Mapping[str, Any]) -> str | None:
        if config.get("schemes") is not None:
            return None
        return (
            "the checkpoint says that it is quantized with quanto_hf, but its config has no 'schemes': it was not "
            "written by save_pretrained"
        )

    def schemes(self, config: Mapping[str, Any], headers: Mapping[str, TensorSpec]) -> dict[str, Scheme]:
        entries = config.get("schemes")
        return read_modules([] if entries is None else entries)

    def describe(self, model: nn.Module, loaded: bool) -> dict[str, Any]:
        return {"schemes": describe_modules(model), "format_version": FORMAT_VERSION}

    def metadata(self) -> dict[str, str]:
        return {VERSION_KEY: str(FORMAT_VERSION)}
