"""What a saved model holds, by its config.json and the headers of its safetensors files."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from quanto_hf.io.checkpoint import CheckpointError, read_headers
from quanto_hf.io.formats import QUANTO, Format, format_of
from quanto_hf.io.formats.quanto import find_guards, without_guards
from quanto_hf.io.split_experts import by_expert
from quanto_hf.nn.packed import Packed, is_matrix
from quanto_hf.nn.slots import WEIGHT, joined
from quanto_hf.schemes import Scheme, TensorSpec, notes

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Item:
    """One weight, or several that are stored alike.

    Args:
        name: of the float weight; empty for several.
        stored: the scheme, or the dtype.
        parameters: elements of the float weight.
        nbytes: as stored, scales and zeros included.
        count: number of weights.
        eligible: elements of those weights that are packed, or could be.
        packed: elements of those that are.
    """

    name: str
    stored: str
    parameters: int
    nbytes: int
    count: int = 1
    eligible: int = 0
    packed: int = 0

    @property
    def bits(self) -> float:
        """Per element."""
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Inventory:
    """Every weight of a saved model, and sentences about all of them. ``format_version`` is None for a model that is
    not in the format of quanto_hf; ``method`` is then that of its config, empty for a float model."""

    rows: list[Item]
    format_version: int | None
    files: int
    method: str = ""
    notes: tuple[str, ...] = ()

    def grouped(self) -> list[Item]:
        """One item for each way to store, the largest first."""
        kinds = {row.stored: [r for r in self.rows if r.stored == row.stored] for row in self.rows}
        return sorted((_sum(rows, kind) for kind, rows in kinds.items()), key=lambda item: -item.nbytes)

    def total(self) -> Item:
        """All of them."""
        return _sum(self.rows, "")

    @property
    def packed(self) -> Packed:
        """How many weights are packed, of those that could be."""
        total = self.total()
        return Packed(total.packed, total.eligible)

    def to_dict(self, every: bool = False) -> dict[str, Any]:
        """In JSON types, with one entry per weight if ``every``."""
        rows = self.rows if every else self.grouped()
        keys = ("name", "stored", "parameters", "bits", "nbytes") if every else _GROUP_KEYS
        return {
            "format_version": self.format_version,
            "files": self.files,
            "method": self.method,
            "packed": self.packed.to_dict(),
            "notes": list(self.notes),
            "rows": [_pick(row, keys) for row in rows],
            "total": _pick(self.total(), ("count", "parameters", "bits", "nbytes")),
        }


_GROUP_KEYS = ("stored", "count", "parameters", "bits", "nbytes")


def _pick(item: Item, keys: tuple[str, ...]) -> dict[str, Any]:
    values = {**asdict(item), "bits": round(item.bits, 4)}
    return {key: values[key] for key in keys}


def _sum(rows: list[Item], stored: str) -> Item:
    sums = {key: sum(getattr(row, key) for row in rows) for key in ("parameters", "nbytes", "eligible", "packed")}
    return Item("", stored, count=len(rows), **sums)


def read_inventory(folder: Path) -> Inventory:
    """Read a saved model; the data of no tensor is read.

    Raises:
        CheckpointError: the folder is no model, a file is missing or damaged, or tensors are missing, unexpected or
            wrong; all of them are named.
    """
    config = _read_json(folder / "config.json", f"{folder} is not a model: it has no config.json")
    files, headers = _read_files(folder)
    quantization = config.get("quantization_config")
    quantization = {} if quantization is None else quantization
    if not isinstance(quantization, dict):
        raise CheckpointError(f"quantization_config in {folder / 'config.json'} is an object, not {quantization!r}")
    schemes: dict[str, Scheme] = {}
    version, saved_as = None, format_of(quantization) or QUANTO
    if saved_as.method == quantization.get("quant_method"):
        try:
            version, schemes = saved_as.version(quantization), saved_as.schemes(quantization, headers)
        except ValueError as error:
            raise CheckpointError(f"the config of {folder} cannot be used: {error}") from None
        headers = without_guards(headers) if saved_as.guarded else headers
    groups: dict[str, dict[str, TensorSpec]] = {}
    rows = []
    for name, spec in headers.items():
        if (slot := _slot_of(name, schemes, saved_as)) is not None:
            groups.setdefault(slot, {})[name] = spec
        else:
            count = prod(spec.shape)
            eligible = count if is_matrix(name, spec.shape) else 0
            rows.append(Item(name, _text(spec.dtype), count, _nbytes(spec), eligible=eligible))
    schemes = by_expert(schemes, groups, saved_as.prefix)
    saved = _saved_names(schemes, groups)
    layers: dict[str, tuple[Scheme, dict[str, TensorSpec]]] = {}
    problems = [f"unexpected: {tensor}" for name in {*groups} - {*saved.values()} for tensor in groups[name]]
    for module, scheme in schemes.items():
        name = saved.get(module, module)
        tensors = groups.get(name, {})
        # of a module's weight, or of another parameter of a module
        of_weight = not tensors or any(tensor.startswith(f"{name}.") for tensor in tensors)
        before = f"{name}.{saved_as.prefix}" if of_weight else f"{name}_"
        found = {tensor.removeprefix(before): spec for tensor, spec in tensors.items()}
        problems += _problems(scheme, found, before)
        if (weight := scheme.weight_of(found)) is not None:
            layers[name] = scheme, found
        count = 0 if weight is None else prod(weight.shape)
        full = joined(name, WEIGHT) if of_weight else name
        nbytes = sum(map(_nbytes, tensors.values()))
        rows.append(Item(full, str(scheme), count, nbytes, eligible=count, packed=count))
    if problems:
        raise CheckpointError(f"{folder} is not what its config says:\n  " + "\n  ".join(sorted(problems)))
    method = str(quantization.get("quant_method", "")) if version is None else ""
    rows.sort(key=lambda row: _natural(row.name))
    return Inventory(rows, version, len(files), method, notes(layers))


def _read_json(file: Path, absent: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(absent) from None
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} cannot be read: it holds no JSON object")
    return found


def _read_files(folder: Path) -> tuple[list[Path], dict[str, TensorSpec]]:
    """The weight files, and the headers of all of them, compared with the index where there is one."""
    if not (folder / INDEX).exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder} has no safetensors files")
        return files, read_headers(files)
    weight_map = _read_json(folder / INDEX, "").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX} cannot be read: it has no weight_map")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise CheckpointError(f"the index of {folder} names files that are not there: {', '.join(absent)}")
    each = {file.name: read_headers([file]) for file in files}
    lines = [
        f"missing: {name}, which the index has in {file}" for name, file in weight_map.items() if name not in each[file]
    ]
    # transformers on its own writes an index without guards
    lines += [
        f"unexpected: {name} in {file}, which the index does not have"
        for file, specs in each.items()
        for name in {*specs} - ({*find_guards(specs)} - {*weight_map})
        if weight_map.get(name) != file
    ]
    if lines:
        raise CheckpointError(f"the files of {folder} do not fit its index:\n  " + "\n  ".join(sorted(lines)))
    return files, read_headers(files)


def _slot_of(name: str, schemes: Mapping[str, Scheme], saved_as: Format) -> str | None:
    """What 'schemes' calls the parameter of which a tensor of a file is a part (:func:`quanto_hf.nn.slots.label`), or
    None for a tensor that is stored as it is."""
    owner, _, leaf = name.rpartition(".")
    if schemes and saved_as.part_of(leaf) is not None:
        return owner
    stem, _, part = leaf.rpartition("_")
    parts = {part for scheme in schemes.values() for part in scheme.names}
    known = part in parts and stem in {label.rpartition(".")[2] for label in schemes}
    return joined(owner, stem) if known else None


def _saved_names(schemes: Mapping[str, Scheme], groups: Mapping[str, Any]) -> dict[str, str]:
    """Module name -> its name in the files. They differ for models that transformers renames on saving: then it is
    the one left over with the longest common end."""
    saved = {module: module for module in schemes if module in groups}
    free: dict[tuple[str, ...], list[str]] = {}
    for name in groups:
        if name not in saved:
            free.setdefault(tuple(name.split(".")[-2:]), []).append(name)
    for module in schemes:
        near = free.get(tuple(module.split(".")[-2:]), [])
        if module not in saved and near:
            saved[module] = max(near, key=lambda name: _common_end(name, module))
            near.remove(saved[module])
    return saved


def _common_end(one: str, other: str) -> int:
    same = 0
    for a, b in zip(reversed(one.split(".")), reversed(other.split(".")), strict=False):
        if a != b:
            break
        same += 1
    return same


def _problems(scheme: Scheme, found: Mapping[str, TensorSpec], before: str) -> list[str]:
    """A line for each stored tensor of a weight that is missing, unexpected or wrong.

    Args:
        found: the stored tensors, by the names of the scheme.
        before: what stands in front of these names in the files.
    """
    if scheme.weight_of(found) is not None:
        return []
    lines = [f"missing: {before}{part}" for part in {*scheme.names} - {*found}]
    lines += [f"unexpected: {before}{part} of {scheme} weights" for part in {*found} - {*scheme.names}]
    if lines or not (candidates := scheme.candidates(found)):
        return lines
    return [
        f"wrong: {before}{part} is {_text(found[part].dtype)} {list(found[part].shape)}, but {scheme} weights "
        f"need {_text(spec.dtype)} {list(spec.shape)}"
        for part, spec in scheme.tensors(candidates[0].shape, candidates[0].dtype).items()
        if found[part] != spec
    ]


def _text(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _nbytes(spec: TensorSpec) -> int:
    if not isinstance(spec.dtype, str):
        return spec.nbytes
    # a dtype that read_headers does not map to one of torch: U16, F8_E8M0, F4 ...
    bits = re.match(r"[A-Z]+(\d+)", spec.dtype)
    return -(-prod(spec.shape) * int(bits.group(1)) // 8) if bits else 0


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
