"""A model saved into a folder that may hold another one: whole, or not at all.

transformers replaces the files of a folder one by one, for as long as it takes to write a model. An interruption then
leaves some files of either model, and as their tensors have the same names and shapes, they load without a word.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from quanto_hf.io.checkpoint import CheckpointError
from quanto_hf.io.folder_lock import only_one
from quanto_hf.io.formats import format_of
from quanto_hf.io.safe_files import sync, write_text

CONFIG = "config.json"
WORK = ".quanto_hf_save-"
LOCK = ".quanto_hf_save.lock"
FILES, NAMES, MARKED = "files", "names.json", "marked.json"
# the key of a quantization config whose folder has some files of one model and some of another; names the work folder
INTERRUPTED = "interrupted_save"


def save_whole(folder: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Have a model written into a work folder inside of ``folder``, and then put all of its files in their places.

    An interruption while files are written leaves the former model as it was. While they are put in place, which is a
    rename for each, the config says so, and loading is refused until :func:`finish_save` or another save. Processes
    that save into one folder wait for each other.

    Args:
        folder: need not exist.
        write: writes a model into the empty folder that it is given.

    Raises:
        OSError: the folder cannot be written, or the disk, which holds both models for a while, is full. The former
            model is still there.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    with only_one(place / LOCK):
        _finish(place)
        for left in place.glob(f"{WORK}*"):
            shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=WORK, dir=place))
        try:
            (work / FILES).mkdir()
            write(work / FILES)
            names = _files(work / FILES)
            for name in names:
                sync(work / FILES / name)
            write_text(work / NAMES, json.dumps(names))
            _mark(place, work)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        _put_in_place(place, work)


def finish_save(folder: str | os.PathLike[str]) -> bool:
    """Put the rest of the files of an interrupted save in place. True if there was one.

    Raises:
        CheckpointError: the files are gone.
    """
    place = Path(folder)
    with only_one(place / LOCK):
        return _finish(place)


def refuse_interrupted(name: object) -> None:
    """Raise the error for a config that has the key ``INTERRUPTED`` with this value."""
    raise CheckpointError(
        f"a save into this folder was interrupted while its files were put in place, so that it holds files of two "
        f"models. Nothing is lost: the rest is in its subfolder {name}. Call quanto_hf.io.finish_save(folder), or save "
        f"the model there again"
    )


def _finish(place: Path) -> bool:
    try:
        name = json.loads((place / CONFIG).read_text(encoding="utf-8"))["quantization_config"][INTERRUPTED]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    work = place / str(name)
    if not re.fullmatch(rf"{re.escape(WORK)}\w+", str(name)) or not (work / FILES / CONFIG).is_file():
        raise CheckpointError(
            f"a save into {place} was interrupted, and its subfolder {name} with the rest of the files is gone; remove "
            f"{place / CONFIG}, and save the model again"
        )
    _put_in_place(place, work)
    return True


def _mark(place: Path, work: Path) -> None:
    """From here on the folder belongs to the new model: its config says that the files are not all there yet."""
    if not (place / CONFIG).exists() or not (work / FILES / CONFIG).exists():
        return
    config = json.loads((work / FILES / CONFIG).read_text(encoding="utf-8"))
    method = (config.get("quantization_config") or {}).get("quant_method")
    config["quantization_config"] = {"quant_method": method, INTERRUPTED: work.name}
    known = format_of({"quant_method": method})
    config["quantization_config"].update({} if known is None else known.spoiled)
    write_text(place / CONFIG, json.dumps(config), work / MARKED)
    sync(place)


def _put_in_place(place: Path, work: Path) -> None:
    """Also for the second time: some files may be there."""
    names = json.loads((work / NAMES).read_text(encoding="utf-8"))
    for former in _superseded(place, names):
        former.unlink(missing_ok=True)
    for name in names:
        if (work / FILES / name).exists():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(work / FILES / name, place / name)
    sync(place)
    shutil.rmtree(work, ignore_errors=True)


def _files(folder: Path) -> list[str]:
    """Paths below a folder, what makes it a model last."""
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(names, key=lambda name: (name == CONFIG, name.endswith(CONFIG), name))


def _superseded(place: Path, names: Iterable[str]) -> list[Path]:
    """Weight files, and indices of them, that a former save has left and the new one does not replace. One file alone
    would be loaded in place of several new ones."""
    new = set(names)
    stems = {m[1] for m in (re.fullmatch(r"(.+?)(-\d{5}-of-\d{5})?\.safetensors", name) for name in new) if m}
    former = "|".join(map(re.escape, stems))
    pattern = re.compile(rf"({former})((-\d{{5}}-of-\d{{5}})?\.safetensors|\.safetensors\.index\.json)")
    return [file for file in place.iterdir() if file.name not in new and stems and pattern.fullmatch(file.name)]
