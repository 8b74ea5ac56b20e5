"""Where a float model is, and which of its files belong to it besides the weights."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quanto_hf.io.checkpoint import DTYPES
from quanto_hf.schemes import TensorSpec

# tokenizers, processors and licences; by suffix, for their names are free
SIDE_SUFFIXES = (".json", ".jsonl", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".spm", ".bpe")
SIDE_PREFIXES = ("LICENSE", "LICENCE", "NOTICE")
NOT_SIDE = ("config.json", "generation_config.json", "quanto_hf_convert.json")


def local_folder(model: str | os.PathLike[str]) -> Path:
    """A model folder: the one given, or the snapshot of a hub id, downloaded if it is not in the cache.

    Raises:
        ValueError: it is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name = os.fspath(model)
    if path.exists() or name.startswith((".", "/", "~")):
        raise ValueError(f"{name} is not a folder with a model")
    side = [f"*{suffix}" for suffix in SIDE_SUFFIXES] + [f"{prefix}*" for prefix in SIDE_PREFIXES]
    try:
        found = Path(snapshot_download(name, allow_patterns=[*side, "*.safetensors"]))
        if not list(found.glob("*.safetensors")):
            found = Path(snapshot_download(name, allow_patterns=[*side, "*.bin"]))
    except HFValidationError:
        raise ValueError(f"{name} is neither a folder nor a hub id") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{name} is not a folder, and the hub does not give it: {first}") from None
    return found


def headers_only(
    model: str | os.PathLike[str], hub: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Path | None, dict[str, TensorSpec] | None]:
    """Where the config and the headers of a model are, without its weights being downloaded.

    Args:
        model: a folder or a hub id.
        hub: where on the hub, as of ``from_pretrained``: revision, token, cache_dir, local_files_only, subfolder.

    Returns:
        The folder: the one given, or the snapshot of a hub id in the cache; None for a hub id whose weights are not in
        the cache, with what the hub says of its tensors (None if they are not in safetensors files).

    Raises:
        ValueError: it is neither a folder nor a hub id, or the hub cannot be asked.
    """
    path, name = Path(model).expanduser(), os.fspath(model)
    if path.is_dir():
        return path, None
    from huggingface_hub import get_safetensors_metadata, snapshot_download
    from huggingface_hub.errors import HFValidationError, NotASafetensorsRepoError

    if path.exists() or name.startswith((".", "/", "~")):
        raise ValueError(f"{name} is not a folder with a model")
    named = {key: hub[key] for key in ("revision", "token") if hub.get(key) is not None}
    cache = {"cache_dir": hub["cache_dir"]} if hub.get("cache_dir") else {}
    subfolder = hub.get("subfolder") or ""
    try:
        found = Path(snapshot_download(name, local_files_only=True, **cache, **named))
        if has_weights(found / subfolder) or hub.get("local_files_only"):
            return found, None
    except HFValidationError:
        raise ValueError(f"{name} is neither a folder nor a hub id") from None
    except OSError:
        if hub.get("local_files_only"):
            raise ValueError(
                f"{name} is not a folder and not in the cache of the hub, and local_files_only=True asks nobody else"
            ) from None
    try:
        # of files in a subfolder the hub tells no sizes in one answer
        files = () if subfolder else get_safetensors_metadata(name, **named).files_metadata.values()
    except NotASafetensorsRepoError:
        return None, None
    except Exception as error:  # offline mode, no such model, no network: each library below has errors of its own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name} is not a folder and not in the cache of the hub, and the hub does not tell its sizes: {first}; "
            f"give a folder, or one with its config.json alone"
        ) from None
    if subfolder:
        return None, None
    return None, {
        key: TensorSpec(tuple(info.shape), DTYPES.get(info.dtype, info.dtype))  # type: ignore[arg-type]
        for file in files
        for key, info in file.tensors.items()
    }


def has_weights(folder: Path) -> bool:
    """Whether a folder has weight files, or an index that names them."""
    return any(next(folder.glob(f"*{end}"), None) for end in (".safetensors", ".bin", ".index.json"))


def side_files(folder: Path) -> dict[str, Path]:
    """Name -> path of the files to copy along: tokenizer, processor, chat templates, licences; folders one deep."""
    found = {}
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name.startswith(".") or name in NOT_SIDE or name.endswith(".index.json"):
            continue
        if path.suffix in SIDE_SUFFIXES or path.name.startswith(SIDE_PREFIXES):
            found[name] = path
    return found
