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
    verified: Annotated[bool, typer.Option("--verify", help="Read every tensor, and check its values.")] = False,
) -> None:
    """What a saved model holds, from its config and the headers of its files; no weights are read without --verify.

    Damaged files, and files and tensors that are missing, wrong or too many, are named. With --verify every tensor is
    read: scales that are not finite and codes that stand for no number are named too, one line each, with exit code 1.

    Example: `quanto-hf inspect out-int4 --verify`
    """
    from quanto_hf.io.inventory import read_inventory

    checked = _verified(folder, as_json) if verified else None
    found = read_inventory(folder)
    rows = found.rows if all_rows else found.grouped()
    if as_json:
        held = found.to_dict(all_rows)
        print(json.dumps(held if checked is None else {**held, **checked}, indent=2))
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
    if found.packed.weights:
        out.print(f"{found.packed}", markup=False)
    out.print(shown)
    for note in found.notes if checked is None else checked["notes"]:
        out.print(note, markup=False)
    if checked is not None:
        out.print(f"verified: {checked['tensors']:,} tensors, no problems", markup=False)


def _verified(folder: Path, as_json: bool) -> dict[str, Any]:
    """What reading every tensor has found, if that is no problem; else it is printed, and the command ends."""
    from quanto_hf.io.verify import verify

    found = verify(folder)
    if found.problems:
        lines = json.dumps({"problems": found.problems, "notes": found.notes}, indent=2) if as_json else ""
        print(lines or "\n".join(found.problems))
        raise typer.Exit(1)
    return {"problems": [], "notes": found.notes, "tensors": found.tensors}


def _columns(all_rows: bool) -> tuple[list[str], list[str]]:
    if all_rows:
        return ["name", "stored"], ["parameters", "bits", "bytes"]
    return ["stored"], ["tensors", "parameters", "bits", "bytes"]


def _cells(row: Any, all_rows: bool) -> list[str]:
    cells = [f"{row.parameters:,}", f"{row.bits:.2f}", size(row.nbytes)]
    return [row.name, row.stored, *cells] if all_rows else [row.stored, f"{row.count:,}", *cells]
