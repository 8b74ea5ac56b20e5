"""``save_pretrained`` of quantized models, which leaves the model that was in the folder alone until it is done."""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from quanto_hf.hf.aqlm_config import AqlmConfig
from quanto_hf.hf.card import complete_card
from quanto_hf.hf.config import QuantoConfig
from quanto_hf.hf.saved_names import choose_original_names
from quanto_hf.io import VERSION_KEY, find_guards, guards_for, read_headers, save_whole, write_model_file

# the key in the metadata of files in another format that we write
WRITER_KEY = "written_by"
# the position of save_original_format among the arguments of save_pretrained, after the folder
ORIGINAL_FORMAT = 7


def save_whole_models(cls: Any) -> None:
    """Let the models of a class that are quantized with quanto_hf be saved through :func:`save_whole`; others are saved
    as before.

    In the class, not in the model: an attribute of a model that knows the model would keep it in memory until Python
    looks for circles.

    Args:
        cls: of a transformers model.
    """
    save = cls.save_pretrained
    if getattr(save, "saves_whole", False):
        return

    @functools.wraps(save)
    def save_pretrained(model: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        main = args[0] if args else kwargs.get("is_main_process", True)
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        # other processes write the rest, or transformers says that this is a file
        if not _is_ours(model) or not main or several or os.path.isfile(save_directory):
            return save(model, save_directory, *args, **kwargs)
        if not getattr(model, "_hf_peft_config_loaded", False) and len(args) <= ORIGINAL_FORMAT:
            asked = kwargs.get("save_original_format", True)
            if choose_original_names(model, asked) != asked:
                kwargs["save_original_format"] = False
        # transformers would take the name of the folder that it is given
        kwargs.setdefault("repo_id", Path(save_directory).name)

        def write(folder: Path) -> None:
            save(model, folder, *args, **kwargs)
            complete_files(folder)

        return save_whole(save_directory, write)

    save_pretrained.saves_whole = True  # type: ignore[attr-defined]
    cls.save_pretrained = save_pretrained
    _complete_cards(cls)


def _complete_cards(cls: Any) -> None:
    """Have the models of a class say in their cards that they are quantized: transformers makes a card last of all, and
    then uploads the folder."""
    upload = cls._upload_modified_files

    @functools.wraps(upload)
    def upload_modified_files(model: Any, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        if isinstance(_config_of(model), QuantoConfig):
            complete_card(model, Path(working_dir))
        return upload(model, working_dir, *args, **kwargs)

    cls._upload_modified_files = upload_modified_files


def _is_ours(model: Any) -> bool:
    return isinstance(_config_of(model), (QuantoConfig, AqlmConfig))


def _config_of(model: Any) -> Any:
    return getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)


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
