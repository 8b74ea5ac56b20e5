"""``quanto-hf bench linear | model``."""

import json
from typing import Annotated, Any

import typer

from quanto_hf.cli.options import (
    WrongUsage,
    activation_types,
    features,
    float_dtype,
    number_types,
    threads,
    whole_numbers,
    words,
)
from quanto_hf.cli.show import console, progress, size, table

bench = typer.Typer(no_args_is_help=True, help="Time linear layers, or a whole model, beside torch's own.")

Weights = Annotated[list[str] | None, typer.Option(help="Number types, with commas or repeated. Default: six of them.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@bench.command("linear")
def linear(
    weights: Weights = None,
    size: Annotated[str, typer.Option("--features", help="Rows and columns of the weight, OUTxIN.")] = "4096x4096",
    rows: Annotated[str, typer.Option(help="Rows of the input.")] = "1,8,128,512",
    dtype: Annotated[str, typer.Option(help="Of input and float weight: float32, bfloat16 or float16.")] = "bfloat16",
    threads_: Annotated[int | None, typer.Option("--threads", help="Default: those of torch.")] = None,
    rounds: Annotated[str, typer.Option(help="Timed calls of each layer; the median counts.")] = "15",
    activations: Annotated[
        list[str] | None, typer.Option(help="Also with x rounded to int8 or float8, with commas or repeated.")
    ] = None,
    static: Annotated[bool, typer.Option("--static", help="Rounded x also with one scale for all of it.")] = False,
    peers: Annotated[bool, typer.Option("--peers", help="Also torchao, bitsandbytes and optimum-quanto.")] = False,
    as_json: Json = False,
) -> None:
    """Quantized linear layers beside torch's own, in turns. A ratio above 1 is faster than torch.

    Each layer is compared with the reference before it is timed. The weights that take turns are more than any cache
    holds.

    Example: `quanto-hf bench linear --weights int8,int4 --rows 1`
    """
    kind, shape, counts = float_dtype(dtype), features(size), whole_numbers("--rows", [rows])
    (repeat,) = whole_numbers("--rounds", [rounds])
    chosen, rounded = number_types(weights), activation_types(activations)
    from quanto_hf.cli.bench_linear import bench_linear

    with threads(threads_) as used, progress() as bar:
        task = bar.add_task("linear", total=len(chosen) * (1 + len(rounded) * (1 + static)) * len(counts))
        found = []
        for row in bench_linear(chosen, shape, counts, kind, repeat, peers, rounded, static):
            found.append(row)
            bar.advance(task)
    if as_json:
        print(json.dumps({"features": shape, "dtype": dtype, "threads": used, "rows": found}, indent=2))
    else:
        _show_linear(found, f"{size}, {dtype}, {_threads(used)}; ratio: torch / layer")
    if any("reason" in row for row in found if row["error"] is not None):
        raise typer.Exit(1)


def _show_linear(found: list[dict[str, Any]], title: str) -> None:
    shown = table(title, ["layer"], ["rows", "torch ms", "ms", "ratio", "error", "vs float"], ["kernel"])
    before = None
    for row in found:
        if before not in (None, row["layer"]) and len({row["rows"] for row in found} - {None}) > 1:
            shown.add_section()
        name, before = "" if row["layer"] == before else row["layer"], row["layer"]
        if "reason" not in row:
            error = "" if row["error"] is None else f"{row['error']:.1e}"
            ms = (f"{row['torch_seconds'] * 1e3:.3f}", f"{row['seconds'] * 1e3:.3f}", f"{row['ratio']:.2f}")
            shown.add_row(name, str(row["rows"]), *ms, error, f"{row['distance']:.1e}", row["kernel"])
        else:
            shown.add_row(name, str(row["rows"] or ""), *["-"] * 5, "see below")
    out = console()
    out.print(shown)
    for row in found:
        if "reason" in row:
            out.print(f"{row['layer']}: {row['reason']}", markup=False)


@bench.command("model")
def model(
    path: Annotated[str | None, typer.Argument(metavar="[PATH_OR_NAME]", help="Default: the bundled model.")] = None,
    weights: Weights = None,
    threads_: Annotated[
        int | None, typer.Option("--threads", help="Default: those of torch; 1 for the bundled model.")
    ] = None,
    tokens: Annotated[str, typer.Option(help="New tokens of a decoding run.")] = "32",
    rounds: Annotated[str, typer.Option(help="Runs of each model; the median counts.")] = "3",
    as_json: Json = False,
) -> None:
    """A causal language model in its own dtype and quantized, in turns: decoding, prefill, loading, memory.

    Example: `quanto-hf bench model --weights int8,int4`
    """
    (repeat,), (new,) = whole_numbers("--rounds", [rounds]), whole_numbers("--tokens", [tokens])
    if new < 2:
        raise WrongUsage("--tokens 1 is too few: the first token is not timed")
    from quanto_hf.qtypes import common_names

    number_types(weights)
    chosen = words(weights) or common_names()
    folder = _folder(path)
    from quanto_hf.cli.bench_model import bench_model

    with threads(1 if path is None and threads_ is None else threads_) as used, progress() as bar:
        task = bar.add_task("model", total=len(chosen) + 1)
        found = []
        for row in bench_model(folder, chosen, new, repeat):
            found.append(row)
            bar.advance(task)
    if as_json:
        print(json.dumps({"model": path or "bundled", "threads": used, "rows": found}, indent=2))
        return
    heads = ["load s", "footprint", "decode tok/s", "ratio", "8 prompts", "ratio", "prefill tok/s", "ratio"]
    shown = table(f"{path or 'the bundled model'}, {_threads(used)}; ratio: above 1 is faster", ["weights"], heads)
    for row in found:
        speeds = [cell for key, ratio in row["ratio"].items() for cell in (_rate(row[key]), f"{ratio:.2f}")]
        shown.add_row(row["model"], f"{row['load_seconds']:.2f}", size(row["footprint"]), *speeds)
    console().print(shown)


def _folder(path: str | None) -> str:
    """The folder of a model.

    Raises:
        WrongUsage: there is none.
    """
    from quanto_hf import tiny_lm
    from quanto_hf.hf.convert.sources import local_folder

    if path is None:
        return str(tiny_lm())
    try:
        found = local_folder(path)
    except ValueError as error:
        raise WrongUsage(str(error)) from None
    if not (found / "config.json").is_file():
        raise WrongUsage(f"{path} is not a model: it has no config.json")
    return str(found)


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"
