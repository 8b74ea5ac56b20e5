"""``quanto-hf inspect``."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from quanto_hf.cli.show import console, size, table


def inspect_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A saved model, quantized or float.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    all_rows: Annotated[bool, typer.Option("--all", help="One row per weight.")] = False,
) -> None:
    """What a saved model holds, from its config and the headers of its files; no weights are read.

    Damaged files, and files and tensors that are missing, wrong or too many, are named.

    Example: `quanto-hf inspect out-int4 --all`
    """
    from quanto_hf.io.inventory import read_inventory

    found = read_inventory(folder)
    rows = found.rows if all_rows else found.grouped()
    if as_json:
        print(json.dumps(found.to_dict(all_rows), indent=2))
        return
    version = found.method or "float" if found.format_version is None else f"quanto_hf format {found.format_version}"
    shown = table(f"{folder}: {version}, {found.files} weight file{'s' * (found.files != 1)}", *_columns(all_rows))
    for row in rows:
        shown.add_row(*_cells(row, all_rows))
    shown.add_section()
    total = found.total()
    blank = [""] if not all_rows else []
    shown.add_row("total", *(blank or [""]), f"{total.parameters:,}", f"{total.bits:.2f}", size(total.nbytes))
    out = console()
    out.print(shown)
    for note in found.notes:
        out.print(note, markup=False)


def _columns(all_rows: bool) -> tuple[list[str], list[str]]:
    if all_rows:
        return ["name", "stored"], ["parameters", "bits", "bytes"]
    return ["stored"], ["tensors", "parameters", "bits", "bytes"]


def _cells(row: Any, all_rows: bool) -> list[str]:
    cells = [f"{row.parameters:,}", f"{row.bits:.2f}", size(row.nbytes)]
    return [row.name, row.stored, *cells] if all_rows else [row.stored, f"{row.count:,}", *cells]
