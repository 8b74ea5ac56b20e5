"""Model cards: what a model was quantized with and how, and the line that installs what it needs."""

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from quanto_hf.flow import Report, report

NAME = "README.md"
TAG = "quanto_hf"
BEGIN, END = "<!-- quanto_hf: begin -->", "<!-- quanto_hf: end -->"
# what transformers says in a card that nobody has written
GENERATED = "This model card has been automatically generated."
# the heading of its template in front of which there is the summary
DETAILS = "## Model Details"


def section(found: Report, cls: str = "AutoModel") -> str:
    """The part of a card about the quantization, in Markdown.

    Args:
        found: of the quantized model.
        cls: name of the class that loads it.

    Example:
        >>> print(section(Report([])).splitlines()[0])
        <!-- quanto_hf: begin -->
    """
    total = sum(map(_numel, found.rows))
    kinds: dict[str, list[Any]] = {}
    for row in found.rows:
        kinds.setdefault("float: " + row.stored if row.reason else row.stored, []).append(row)
    lines = [
        f"| {kind} | {len(rows)} | {sum(map(_numel, rows)) / total:.1%} | {Report(rows).bits:.2f} |"
        for kind, rows in sorted(kinds.items(), key=lambda item: -sum(map(_numel, item[1])))
    ]
    return "\n".join(
        [
            BEGIN,
            "## Quantization",
            "",
            f"Quantized with quanto_hf to {found.bits:.2f} bits per parameter, {found.nbytes / 1e6:,.1f} MB.",
            "Without quanto_hf, transformers refuses the files.",
            "",
            "```",
            "pip install quanto-hf",
            "```",
            "",
            "```python",
            "import quanto_hf",
            f"from transformers import {cls}",
            "",
            f'model = {cls}.from_pretrained("<this repository or folder>")',
            "```",
            "",
            "| stored as | parameters | share of the elements | bits per element |",
            "|---|---|---|---|",
            *lines,
            END,
        ]
    )


def _numel(row: Any) -> int:
    return torch.Size(row.shape).numel()


def complete_card(model: Any, folder: Path) -> None:
    """Add the tag to the card in a folder, and the section to one that nobody has written; a user's text stays.

    Args:
        model: quantized.
        folder: with what is to be uploaded; nothing happens if it has no card.
    """
    file = folder / NAME
    if not file.is_file():
        return
    card = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    data: Any = card.data
    tags = list(data.tags or [])
    data.tags = tags if TAG in tags else [*tags, TAG]
    made, text = section(report(model), type(model).__name__), card.text
    if BEGIN in text and END in text:
        # of a former push
        text = re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: made, text, count=1, flags=re.DOTALL)
    elif GENERATED in text and DETAILS in text:
        text = text.replace(DETAILS, f"{made}\n\n{DETAILS}", 1)
    elif GENERATED in text:
        text = f"{text.rstrip()}\n\n{made}\n"
    card.text = text
    card.save(file)


def write_card(folder: Path, found: Report, cls: str) -> None:
    """Write a card into a folder that has none."""
    file = folder / NAME
    if not file.exists():
        data = ModelCardData(library_name="transformers", tags=[TAG])
        file.write_text(f"---\n{data.to_yaml()}\n---\n\n# {cls}\n\n{section(found, cls)}\n", encoding="utf-8")
