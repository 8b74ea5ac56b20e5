"""``quanto-hf eval``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from quanto_hf.cli.layers import layer_table
from quanto_hf.cli.options import words
from quanto_hf.cli.plot import check_plot, draw_layers
from quanto_hf.cli.show import console, progress, table

# enough for errors of layers, which differ by a few percent from one text to the next
LAYER_TOKENS = 2048
WINDOWS_AT_A_TIME = 4


def evaluate_command(
    model: Annotated[str, typer.Argument(help="A causal language model: folder or hub id, float or quantized.")],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to evaluate on. Default: the bundled one.")] = None,
    reference: Annotated[str | None, typer.Option(help="The float model, for the KL divergence from it.")] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(help="Quantize the float MODEL with these types, with commas or repeated."),
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 256,
    limit_windows: Annotated[int | None, typer.Option(min=1, help="Evaluate on the first N windows only.")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Also the error of every layer, on 2,048 tokens.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the errors of the layers into this PNG file.")] = None,
) -> None:
    """Perplexity of a causal language model, and its KL divergence from the float one.

    With `--weights`, MODEL is float: it is quantized on loading, and is its own reference. `--layers` shows where the
    error comes from: what each layer adds for exact inputs (own), and what has come together up to it (accumulated).

    Example: `quanto-hf eval out-int4 --reference path/to/float --limit-windows 20`
    """
    types = words(weights)
    if types and reference is not None:
        raise ValueError("give --reference or --weights: with --weights MODEL itself is the reference")
    if plot is not None and not layers:
        raise ValueError("--plot draws what --layers measures: give both")
    if layers and not types and reference is None:
        raise ValueError("--layers compares with the float model: give --reference, or --weights with a float MODEL")
    if plot is not None:
        check_plot(plot)
    rows, tokens, compared = _evaluate_all(model, text, reference, types, length, limit_windows, layers)
    shown = table(
        f"{tokens:,} tokens of {text or 'held-out text'}, in windows of {length}",
        ["model"],
        ["perplexity", "vs float", "KL"],
    )
    base = rows[0][1].perplexity if types or reference is not None else None
    for number, (name, found) in enumerate(rows):
        change = f"{100 * (found.perplexity / base - 1):+.2f}%" if base and number else ""
        shown.add_row(name, f"{found.perplexity:.4f}", change, f"{found.kl:.5f}" if number else "")
    console().print(shown)
    for name, comparison in compared.items():
        console().print(layer_table(name, comparison))
    if plot is not None:
        draw_layers(plot, compared)


def _evaluate_all(
    model: str,
    text: Path | None,
    reference: str | None,
    weights: list[str],
    length: int,
    limit: int | None,
    layers: bool,
) -> tuple[list[tuple[str, Any]], int, dict[str, Any]]:
    """(name, evaluation) of each model, the float one first where there is one; the number of tokens; and name ->
    comparison of its layers if it is wanted."""
    from quanto_hf import QuantoConfig
    from quanto_hf.cli import measure
    from quanto_hf.flow import compare, evaluate
    from quanto_hf.hf.convert.sources import local_folder

    for name in weights:
        QuantoConfig(weights=name)
    written = measure.read_text(text)
    path = str(local_folder(model))
    first = path if reference is None else str(local_folder(reference))
    wanted = [(name, path, name) for name in weights]
    if reference is not None:
        wanted = [(model, path, "")]
    loaded = measure.load(first)
    if weights and getattr(loaded, "is_quantized", False):
        raise ValueError(f"{model} is quantized already: --weights needs the float model")
    if reference is not None and getattr(loaded, "is_quantized", False):
        raise ValueError(f"{reference} is quantized: --reference is the float model")
    inputs = measure.cut(written, measure.tokenizer(path), loaded.config, length, limit)
    base = measure.Remembered(loaded)
    with progress() as bar:
        task = bar.add_task("evaluating", total=inputs.shape[0] * (len(wanted) + 1))

        def advance(done: int, before: int = 0) -> None:
            bar.update(task, completed=before * inputs.shape[0] + done)

        rows = [(reference or model, evaluate(base, inputs, progress=advance))]
        compared = {}
        for number, (name, folder, kind) in enumerate(wanted, start=1):
            other = measure.load(folder, kind or None)
            step = _after(advance, number)
            rows.append((name, evaluate(other, inputs, base, progress=step)))
            if layers:
                some = inputs[: max(1, LAYER_TOKENS // length)]
                parts = [some[start : start + WINDOWS_AT_A_TIME] for start in range(0, len(some), WINDOWS_AT_A_TIME)]
                compared[name] = compare(loaded, other, [{"input_ids": part} for part in parts])
    return rows, rows[0][1].tokens, compared


def _after(advance: Any, number: int) -> Any:
    return lambda done: advance(done, number)
