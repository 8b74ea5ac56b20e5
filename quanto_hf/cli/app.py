"""The commands put together, and what is the same for all of them: errors, ``--debug``, ``--version``."""

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from quanto_hf.cli.bench import bench
from quanto_hf.cli.demo import demo
from quanto_hf.cli.eval import evaluate_command
from quanto_hf.cli.inspect import inspect_command
from quanto_hf.cli.kernels import kernels
from quanto_hf.cli.options import WrongUsage
from quanto_hf.cli.plan import plan_command
from quanto_hf.cli.quantize import quantize
from quanto_hf.cli.quiet import quiet


class Commands(TyperGroup):
    """Runs a command, and tells an error in a sentence on stderr instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """As of TyperGroup."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if is_for_typer(error) or os.environ.get("QUANTO_HF_DEBUG") == "1":
                raise
            typer.echo(f"error: {sentence(error)}", err=True)
            raise typer.Exit(2 if isinstance(error, WrongUsage) else 1) from None


def is_for_typer(error: Exception) -> bool:
    """Whether typer itself shows this, as it does for wrong usage; by name, since typer brings its own click."""
    return any(cls.__name__ in ("ClickException", "Exit", "Abort") for cls in type(error).__mro__)


def sentence(error: Exception) -> str:
    """What is told about an error. The text of quanto_hf's own errors (ValueError) is whole; others are cut to their
    first line, which tells their kind where it is not one of the operating system."""
    if isinstance(error, ValueError):
        return str(error).strip() or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}"
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [""]
    kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
    return f"{kind}{lines[0]} (--debug shows where)"


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Quantize Hugging Face models: see what it costs and takes, convert, inspect, evaluate and time them.",
)


def _version(wanted: bool) -> None:
    if wanted:
        import quanto_hf

        typer.echo(f"quanto-hf {quanto_hf.__version__}")
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What all commands share."""
    if debug:
        os.environ["QUANTO_HF_DEBUG"] = "1"
    quiet()


app.command("demo")(demo)
app.command("quantize")(quantize)
app.command("inspect")(inspect_command)
app.command("plan")(plan_command)
app.command("eval")(evaluate_command)
app.command("kernels")(kernels)
app.add_typer(bench, name="bench")
