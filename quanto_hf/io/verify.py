"""Every tensor of a saved model read once: what its headers cannot tell."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quanto_hf.io.checkpoint import CheckpointError, read_headers
from quanto_hf.io.formats import QUANTO, Format, format_of
from quanto_hf.io.inventory import INDEX, read_inventory
from quanto_hf.io.mapped import MappedFiles
from quanto_hf.io.whole_save import INTERRUPTED
from quanto_hf.nn.slots import WEIGHT, joined
from quanto_hf.qtypes import QTYPES

# elements that are looked at together: a mapped file is read through, and not into memory
BLOCK = 1 << 22
INPUT_SCALE = "input_scale"
# the first format in which a float weight of no elements stands beside packed ones
SENTINELS = 2


@dataclass
class Verified:
    """What was found. ``problems`` are reasons not to use the model, ``notes`` are not; ``tensors`` have been read."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tensors: int = 0


def verify(folder: Path) -> Verified:
    """Read all of a saved model, quantized or float.

    Checked are: what :func:`quanto_hf.io.inventory.read_inventory` names (files, index, names, shapes, dtypes, the
    config); that scales, zeros and codebooks are finite, and that no float weight is NaN; codes that stand for no
    number; and float weights beside packed ones. A zero may have any finite value, and any bits are codes of integers,
    tables and AQLM.

    Args:
        folder: of the model.
    """
    found = Verified()
    stored: dict[str, str] = {}
    version = None
    try:
        inventory = read_inventory(folder)
        stored = {row.name.removesuffix(f".{WEIGHT}"): row.stored for row in inventory.rows}
        version = inventory.format_version
        found.notes += inventory.notes
    except ValueError as error:
        head, *lines = str(error).splitlines()
        found.problems += [line.strip() for line in lines] or [head]
    saved_as = _format(folder, found)
    _check_index(folder, found)
    names: set[str] = set()
    packed: set[str] = set()
    for name, tensor in _tensors(folder, found):
        owner, _, leaf = name.rpartition(".")
        names.add(name)
        # of a quantized layer there is one row, and the name of a plain tensor is that of its own
        kind = "" if name in stored else stored.get(owner, "")
        part = saved_as.part_of(leaf)
        if part is not None:
            packed.add(owner)
        _check(name, part, tensor, kind, found)
        found.tensors += 1
    _check_beside(names, packed, folder, version, found)
    return found


def _format(folder: Path, found: Verified) -> Format:
    """The format that the config names, as far as there is one; else ours."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        if INTERRUPTED in config:
            found.problems.append("config.json: saving was interrupted, and the files are those of two models")
        return format_of(config) or QUANTO
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return QUANTO


def _files(folder: Path) -> list[Path]:
    """The files of the index that are there, or all of them."""
    every = sorted(folder.glob("*.safetensors"))
    try:
        listed = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return every
    return [file for file in every if file.name in listed]


def _check_index(folder: Path, found: Verified) -> None:
    """What the index says besides names, and files that it does not know."""
    files = _files(folder)
    found.notes += [
        f"{file.name} is not in the index" for file in sorted(folder.glob("*.safetensors")) if file not in files
    ]
    try:
        size = json.loads((folder / INDEX).read_text(encoding="utf-8"))["metadata"]["total_size"]
        actual = sum(spec.nbytes for file in files for spec in read_headers([file]).values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    if size != actual:
        found.notes.append(f"the index says {size} bytes, and the tensors have {actual}")


def _tensors(folder: Path, found: Verified) -> Iterator[tuple[str, torch.Tensor]]:
    mapped = MappedFiles()
    for file in _files(folder):
        try:
            names = list(read_headers([file]))
        except CheckpointError as error:
            # the inventory has said so, unless it stopped before
            if not any(file.name in problem for problem in found.problems):
                found.problems.append(str(error))
            continue
        for name in names:
            try:
                yield name, mapped.tensor(file, name)
            except CheckpointError as error:
                found.problems.append(str(error))


def _check(name: str, part: str | None, tensor: torch.Tensor, kind: str, found: Verified) -> None:
    """Look at the values of one tensor; ``part`` says which one of a weight it is, and ``kind`` how that is stored."""
    if name.rpartition(".")[2] == INPUT_SCALE:
        if not bool(torch.isfinite(tensor).all()):
            found.notes.append(f"{name} is not finite: this layer is not calibrated yet")
    elif tensor.is_floating_point():
        ours = part is not None
        count = _count(tensor, lambda block: ~torch.isfinite(block) if ours else block.isnan())
        if count:
            what = "NaN or infinite" if ours else "NaN"
            found.problems.append(f"{name}: {count} of {tensor.numel()} values are {what}")
        elif not ours and (count := _count(tensor, torch.isinf)):
            found.notes.append(f"{name}: {count} of {tensor.numel()} values are infinite")
    elif part == "packed":
        _check_codes(name, tensor, QTYPES.get(kind.partition(" ")[0]), found)


def _check_codes(name: str, codes: torch.Tensor, qtype: Any, found: Verified) -> None:
    if qtype is None:
        return
    if qtype.float_dtype is not None:
        count = _count(codes, lambda part: ~torch.isfinite(part.view(qtype.float_dtype).float()))
        if count:
            found.problems.append(f"{name}: {count} of {codes.numel()} codes are no numbers of {qtype.name}")
    elif qtype.storage is torch.int8 and codes.dtype is torch.int8:
        low = int(qtype.qmin) - 1
        if count := _count(codes, lambda part: part == low):
            found.notes.append(f"{name}: {count} of {codes.numel()} codes are {low}, which quanto_hf does not write")


def _count(tensor: torch.Tensor, which: Any) -> int:
    flat, total = tensor.reshape(-1), 0
    for start in range(0, flat.numel(), BLOCK):
        total += int(which(flat[start : start + BLOCK]).sum())
    return total


def _check_beside(names: set[str], packed: set[str], folder: Path, version: Any, found: Verified) -> None:
    """A packed layer has no float weight; one of no elements tells other programs that it is packed."""
    beside = {joined(owner, WEIGHT) for owner in packed} & names
    specs = {name: spec for file in _files(folder) for name, spec in _headers(file).items() if name in beside}
    found.problems += [
        f"{name} is stored as floats of shape {list(spec.shape)} beside the packed weight"
        for name, spec in sorted(specs.items())
        if 0 not in spec.shape
    ]
    if packed and isinstance(version, int) and version >= SENTINELS and not beside:
        found.problems.append(f"no packed layer has the empty weight of format {version}: other programs load noise")


def _headers(file: Path) -> dict[str, Any]:
    try:
        return dict(read_headers([file]))
    except CheckpointError:
        return {}
