"""Text to calibrate and train the bundled model with: of the kind that it was trained on, and none of the held-out one.

Docstrings of Python's standard library and of numpy, torch and transformers, as they are installed here, extracted as
examples/train_tiny_lm.py does. Files that were held out are left out, and so is each paragraph of the held-out text.
"""

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch

import quanto_hf
from quanto_hf.flow import windows

PACKAGES = ("python", "numpy", "torch", "transformers")
SCRIPT = Path(__file__).parent.parent / "examples/train_tiny_lm.py"


def training_windows(tokenizer: Any, count: int, length: int = 256) -> torch.Tensor:
    """Token ids, shape (at most ``count``, length), files in the order of a hash."""
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    packages, _ = script.find_sources([Path(torch.__file__).parent.parent])
    files = [file for name, found in packages if name in PACKAGES for file in found]
    seen = {_key(paragraph) for paragraph in quanto_hf.heldout_text().split("\n\n")}
    ids: list[int] = []
    for relative, path in sorted(files, key=lambda file: script.file_hash("training" + file[0])):
        if script.file_hash(relative) % script.HELDOUT_ONE_IN == 0:
            continue
        texts = [text for docstring in script.docstrings_of(path) for text in docstring if _key(text) not in seen]
        seen.update(map(_key, texts))
        if texts:
            ids += tokenizer("\n\n".join(texts), verbose=False).input_ids
        if len(ids) >= count * length:
            break
    return windows(ids, length)[:count]


def _key(paragraph: str) -> str:
    """What stays equal if case, digits and punctuation change."""
    return re.sub(r"[\W\d_]+", "", paragraph).lower()
