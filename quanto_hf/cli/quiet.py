"""What other libraries print while a command runs, and how our own warnings are shown."""

import os
import sys
import warnings
from typing import Any

import typer


def quiet() -> None:
    """Silence progress bars and messages of transformers and the hub. Warnings of quanto_hf are told in a line; all
    others are dropped. Call it before transformers is used."""
    if os.environ.get("QUANTO_HF_DEBUG") == "1":
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    # RuntimeWarning: a native kernel that disagrees with the reference
    for category in (UserWarning, RuntimeWarning):
        warnings.filterwarnings("always", category=category, module=r"quanto_hf(\.|$)")
    warnings.showwarning = _show
    if not {"--help", "-h"} & set(sys.argv):
        silence_transformers()


def _show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    typer.echo(f"warning: {message}", err=True)


def silence_transformers() -> None:
    """No messages and no progress bars."""
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
