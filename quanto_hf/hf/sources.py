"""Where a float model is, and which of its files belong to it besides the weights."""

import os
from pathlib import Path

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
