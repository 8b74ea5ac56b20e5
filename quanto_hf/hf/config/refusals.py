"""What is refused in a sentence of our own, because transformers would say something that leads elsewhere."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quanto_hf.hf.config.foreign_words import SHORT
from quanto_hf.hf.config.quanto import as_name
from quanto_hf.io import CheckpointError
from quanto_hf.qtypes import QType, weight_names

# of optimum-quanto: a file beside the weights, and what their names end in
QMAP = "quanto_qmap.json"
QMAP_NAMES = (".weight._data", ".weight._data._data", ".weight._scale", ".weight._shift")


def refuse_no_config(given: Any, argument: str = "quantization_config") -> None:
    """Raise TypeError for a config that is the name of a number type, or a class.

    Args:
        given: what was given for the config.
        argument: its name there.
    """
    if isinstance(given, str | QType):
        name = as_name(given)
        weights = name.removeprefix("q") if name.removeprefix("q") in weight_names() else "int4"
        said = "a number type" if isinstance(given, QType) else "a str"
        raise TypeError(
            f"{argument}={SHORT.repr(name)} is {said}, not a config: write "
            f'{argument}=quanto_hf.QuantoConfig(weights="{weights}")'
        )
    if isinstance(given, type) and given.__module__.startswith("quanto_hf"):
        raise TypeError(
            f"{argument}={given.__name__} is the class, not a config: write {given.__name__}(), such as "
            f'{argument}=quanto_hf.QuantoConfig(weights="int4")'
        )


def refuse_without_optimum_quanto() -> None:
    """Raise ImportError for transformers' own QuantoConfig where nothing can serve it."""
    from transformers.utils import is_optimum_quanto_available

    if not is_optimum_quanto_available():
        raise ImportError(
            "this is the QuantoConfig of transformers, which needs optimum-quanto; it is not installed. For quanto_hf "
            'write `from quanto_hf import QuantoConfig`, or call quanto_hf.install(override="quanto") first'
        )


def refuse_optimum_quanto(names: Iterable[str], files: Iterable[str] = ()) -> None:
    """Raise CheckpointError for a checkpoint that optimum-quanto wrote: its config does not say so.

    Args:
        names: of the tensors in the files, as far as they are known.
        files: the weight files.
    """
    names = list(names)
    by_name = next((name for name in names if name.endswith(QMAP_NAMES)), None)
    beside = not names and any((Path(file).parent / QMAP).is_file() for file in files)
    if by_name is not None or beside:
        found = f"has {by_name}" if by_name is not None else f"has a {QMAP}"
        raise CheckpointError(
            f"the checkpoint was written by optimum-quanto ({found}), whose weights quanto_hf does not read: quantize "
            f"the original float model; docs/from-optimum-quanto.md says how"
        )
