"""``quanto-hf quantize``."""

from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer

from quanto_hf.cli.show import console, progress, size, table


def quantize(
    model: Annotated[str, typer.Argument(help="A float model: folder, hub id or GGUF file.")],
    out: Annotated[Path, typer.Argument(help="A new or empty folder, or the one of an interrupted same command.")],
    weights: Annotated[
        str, typer.Option(help="Number type, such as int8, int4, float8 or nf4; `quanto-hf kernels` lists all.")
    ] = "int8",
    group_size: Annotated[
        int | None, typer.Option(help="Columns that share a scale; -1 is whole rows. Default: that of the type.")
    ] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="Without or with a zero point.")
    ] = None,
    fit: Annotated[str | None, typer.Option(help="How scales are found. Default: the best without data.")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Pattern of modules that stay float, besides the defaults; repeatable.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option(help="PATTERN=TYPE: another type, or 'float', for some modules; repeatable.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Size of an output file; memory is about this much.")] = "2GB",
    dtype: Annotated[str, typer.Option(help="Of what stays float: auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Quantize a checkpoint into a folder that `from_pretrained` loads.

    One output file at a time, so that a model larger than memory can be converted; a GGUF file is loaded as a whole
    first, and its tokenizer is converted too. Interrupted, the same command goes
    on where it stopped.

    Example: `quanto-hf quantize path/to/model out-int4 --weights int4 --override '*.down_proj=int8'`
    """
    from quanto_hf import QuantoConfig
    from quanto_hf.hf.convert.convert import convert_checkpoint
    from quanto_hf.hf.convert.sources import local_folder
    from quanto_hf.hf.load.gguf import named_gguf
    from quanto_hf.hf.save.card import write_card

    config = QuantoConfig(
        weights=weights,
        group_size=group_size,
        symmetric=symmetric,
        fit=fit,
        modules_to_not_convert=exclude,
        overrides=parse_overrides(override or []),
    )
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r} is not known; choose auto, float32, bfloat16 or float16")
    source = named_gguf(model) or local_folder(model)
    with progress() as bar:
        task = bar.add_task("quantizing", total=None)
        done = convert_checkpoint(
            *(source, out, config),
            dtype=dtype,
            max_shard_size=max_shard_size,
            progress=lambda count, total: bar.update(task, completed=count, total=total),
        )
    write_card(out, done.report, done.cls)
    _show(out, done)


def parse_overrides(given: list[str]) -> dict[str, dict[str, Any]]:
    """``["*.down_proj=int8"]`` -> ``{"*.down_proj": {"weights": "int8"}}``; the type "float" is None.

    Raises:
        ValueError: an item has no "=".
    """
    overrides: dict[str, dict[str, Any]] = {}
    for item in given:
        pattern, found, kind = item.rpartition("=")
        if not found or not pattern or not kind:
            raise ValueError(f"--override {item!r} is not PATTERN=TYPE, such as '*.down_proj=int8'")
        overrides[pattern] = {"weights": None if kind == "float" else kind}
    return overrides


def _show(out: Path, done: Any) -> None:
    """The summary."""
    shown = console()
    if done.not_streamed:
        shown.print(f"The model was loaded as a whole: {done.not_streamed}.")
    if not done.written:
        shown.print(f"{out} was complete already; its {done.kept} weight files are as they were written.")
    elif done.kept:
        shown.print(f"{done.kept} weight files of a former run were checked and kept; {done.written} written.")
    quantized = [row for row in done.report.rows if not row.reason]
    ratio = f", {done.nbytes_before / done.nbytes_after:.2f} times smaller" if done.nbytes_after else ""
    shown.print(f"{out}: {size(done.nbytes_before)} -> {size(done.nbytes_after)}{ratio}")
    shown.print(f"{len(quantized)} weights quantized, {done.report.quantized_bits:.2f} bits per weight")
    groups: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for row in done.report.rows:
        if row.reason:
            groups[row.reason, row.stored].append(row)
    left = table("left in float", ["reason", "dtype"], ["tensors", "bytes"], ["such as"])
    for (reason, stored), rows in sorted(groups.items(), key=lambda item: -sum(row.nbytes for row in item[1])):
        left.add_row(reason, stored, f"{len(rows)}", size(sum(row.nbytes for row in rows)), rows[0].name)
    shown.print(left)
