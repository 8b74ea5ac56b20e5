"""The files of quantized models that ``save_pretrained`` of transformers writes: aligned tensors, and guards."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from safetensors import safe_open

from quanto_hf.io import VERSION_KEY, find_guards, guards_for, read_headers, write_model_file
from quanto_hf.io.formats.base import WRITER_KEY


def write_own_files() -> None:
    """Have transformers write files with our mark in their metadata by :func:`write_model_file`, and all others as
    before. Only there do the tensors have their names in the file, which guards are named after: transformers renames,
    merges and splits them last. Once: what others put around it is theirs."""
    modeling: Any = transformers.modeling_utils
    if getattr(modeling, "knows_quanto_hf", False):
        return
    write = modeling.safe_save_file

    @functools.wraps(write)
    def save_file(tensors: Any, filename: Any, metadata: Mapping[str, str] | None = None) -> Any:
        if not {VERSION_KEY, WRITER_KEY}.isdisjoint(metadata or {}):
            return write_model_file(tensors, filename, metadata or {})
        return write(tensors, filename, metadata=metadata)

    modeling.safe_save_file, modeling.knows_quanto_hf = save_file, True


def complete_files(folder: Path) -> None:
    """Add the guards to the index of a model in several files: transformers has made it before it wrote them. A file
    that something else has written, without them, is written again."""
    for file in folder.glob("*.safetensors"):
        headers = read_headers([file])
        if len(find_guards(headers)) < len(guards_for(headers)):
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                if VERSION_KEY in metadata:
                    tensors = {name: opened.get_tensor(name) for name in opened.keys()}
                    write_model_file(tensors, file, metadata)
    for index in folder.glob("*.safetensors.index*.json"):
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] = with_guards(folder, content["weight_map"])
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def with_guards(folder: Path, weight_map: Mapping[str, str]) -> dict[str, str]:
    """Name -> file of the tensors of a model, with the guards that these files have."""
    found = {name: file for file in set(weight_map.values()) for name in find_guards(read_headers([folder / file]))}
    return {**weight_map, **found}
