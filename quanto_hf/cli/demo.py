"""``quanto-hf demo``."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from quanto_hf.cli.show import console, progress, size, table

# 4,080 predicted tokens: the whole demo takes well under a minute
WINDOWS = 16
PROMPT = "Return the"


@dataclass(frozen=True)
class Measured:
    """One row of the table."""

    name: str
    bits: float
    disk: int
    ram: int
    perplexity: float
    kl: float
    speed: float
    text: str


def demo(
    weights: Annotated[
        list[str] | None, typer.Option(help="Number type; repeat it for several. Default: all of them.")
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(
            help="One more row, with embeddings and the head of this type too. Default: int8, with all types."
        ),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to evaluate on. Default: the bundled one.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw size against perplexity into this PNG file.")] = None,
    model: Annotated[str | None, typer.Option(help="Another causal language model. Default: the bundled one.")] = None,
) -> None:
    """Quantize a small bundled model with each number type, and show what it costs and what it saves.

    Every type is quantized on loading, saved, reloaded and checked to answer bit for bit the same; then measured.

    Example: `quanto-hf demo --weights int8 --weights int4`
    """
    from quanto_hf.qtypes import common_names

    names = tuple(weights or common_names())
    chosen: dict[str, dict[str, Any]] = {name: {"weights": name} for name in names}
    if embeddings is not None or weights is None:
        base = {"weights": "int4" if "int4" in names else names[0], "embeddings": embeddings or "int8"}
        chosen["{weights}, embeddings {embeddings}".format(**base)] = base
    if plot is not None:
        from quanto_hf.cli.plot import check_plot

        check_plot(plot)
    with one_thread(model is None):
        rows, tokens = measure_all(chosen, text, model)
    where, what = "CPU" if model else "one CPU thread", text or "held-out text"
    shown = table(
        f"{model or 'the bundled model'} on {where}: perplexity and KL on {tokens:,} tokens of {what}",
        ["type"],
        ["bits/weight", "on disk", "in RAM", "perplexity", "vs float", "KL", "tokens/s"],
        [f"{PROMPT!r} goes on"],
    )
    for row in rows:
        change = f"{100 * (row.perplexity / rows[0].perplexity - 1):+.2f}%" if row is not rows[0] else ""
        kl = f"{row.kl:.4f}" if row is not rows[0] else ""
        shown.add_row(
            *(row.name, f"{row.bits:.2f}", size(row.disk), size(row.ram), f"{row.perplexity:.3f}", change, kl),
            *(f"{row.speed:.0f}", row.text),
        )
    out = console()
    out.print(shown)
    out.print("Each quantized model was saved, reloaded, and gave bit-equal logits.")
    if plot is not None:
        from quanto_hf.cli.plot import draw

        draw(plot, rows)
        out.print(f"plot: {plot}")


@contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """One thread for the bundled model: it is so small that threads wait for each other longer than they work. Beside
    another busy process 2 threads made 4 to 60 tokens per second, and one 200."""
    import torch

    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_all(chosen: dict[str, dict[str, Any]], text: Path | None, model: str | None) -> tuple[list[Measured], int]:
    """The float model and each way; and the number of tokens that were predicted.

    Args:
        chosen: name of a row -> arguments of QuantoConfig.
    """
    from quanto_hf import QuantoConfig, tiny_lm
    from quanto_hf.cli import measure
    from quanto_hf.hf.convert.sources import local_folder

    # a wrong name is told before anything is loaded
    configs = {name: QuantoConfig(**values) for name, values in chosen.items()}
    path = str(local_folder(model)) if model else tiny_lm()
    tokens = measure.tokenizer(path)
    with progress() as bar:
        task = bar.add_task("float", total=len(chosen) + 1)
        loaded = measure.load(path)
        inputs = measure.cut(measure.read_text(text), tokens, loaded.config, measure.LENGTH, WINDOWS)
        reference = measure.Remembered(loaded)
        rows = [measure_one(loaded, reference, inputs, tokens, path)]
        bar.advance(task)
        for name, config in configs.items():
            bar.update(task, description=name)
            with tempfile.TemporaryDirectory() as folder:
                quantized = saved_and_reloaded(path, config, folder, inputs[:1])
                rows.append(measure_one(quantized, reference, inputs, tokens, folder, name))
            bar.advance(task)
    return rows, inputs.shape[0] * (inputs.shape[1] - 1)


def saved_and_reloaded(path: str, config: Any, folder: str, inputs: Any) -> Any:
    """A model quantized on loading, saved to a folder, and loaded from there.

    Raises:
        RuntimeError: it then answers differently.
    """
    import torch

    from quanto_hf.cli import measure

    with torch.no_grad():
        first = measure.load(path, config)
        wanted = first(input_ids=inputs).logits
        first.save_pretrained(folder)
        del first
        second = measure.load(folder)
        if not torch.equal(second(input_ids=inputs).logits, wanted):
            raise RuntimeError(f"the {config.weights} model answers differently after it was saved and reloaded")
    return second


def measure_one(model: Any, reference: Any, inputs: Any, tokens: Any, folder: str, name: str = "") -> Measured:
    """One row: of a quantized model, or of the float one."""
    from quanto_hf.cli import measure
    from quanto_hf.flow import evaluate, report

    found = evaluate(reference if reference.model is model else model, inputs, reference)
    line, speed = measure.generate(model, tokens, PROMPT)
    dtype = str(model.dtype).removeprefix("torch.")
    return Measured(
        name=name or f"float ({dtype})",
        bits=report(model).quantized_bits if name else 8.0 * model.dtype.itemsize,
        disk=measure.disk_bytes(folder),
        ram=model.get_memory_footprint(),
        perplexity=found.perplexity,
        kl=found.kl or 0.0,
        speed=speed,
        text=line.removeprefix(PROMPT).strip(),
    )
