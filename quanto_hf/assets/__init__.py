"""Files that are part of the package: a small language model and text that it was not trained on. Imports nothing."""

from pathlib import Path

_HERE = Path(__file__).parent


def tiny_lm() -> str:
    """Folder of the bundled Llama-architecture language model, for ``from_pretrained``."""
    return str(_HERE / "tiny-lm")


def heldout_text() -> str:
    """Text that the bundled model was not trained on."""
    return (_HERE / "tiny-lm" / "heldout.txt").read_text(encoding="utf-8")
