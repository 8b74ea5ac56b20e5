"""``save_pretrained`` of quantized models, which leaves the model that was in the folder alone until it is done."""

import functools
import os
from pathlib import Path
from typing import Any

import torch

from quanto_hf.hf.config import QuantoConfig
from quanto_hf.io import save_whole


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
        # transformers would take the name of the folder that it is given
        kwargs.setdefault("repo_id", Path(save_directory).name)
        return save_whole(save_directory, lambda folder: save(model, folder, *args, **kwargs))

    save_pretrained.saves_whole = True  # type: ignore[attr-defined]
    cls.save_pretrained = save_pretrained


def _is_ours(model: Any) -> bool:
    quantizer = getattr(model, "hf_quantizer", None)
    return isinstance(getattr(quantizer, "quantization_config", None), QuantoConfig)
