"""The command line: ``quanto-hf demo | quantize | inspect | plan | eval | kernels | bench``. A thin face: the work is
done in the rooms below.

Imports: every room above; torch and transformers inside of commands only.
"""

import sys

NEEDS = 'the command line needs typer and rich: pip install "quanto-hf[cli]"'


def main() -> None:
    """Entry point of ``quanto-hf``. Exits with 0, 1 (an error, told in a sentence) or 2 (wrong usage)."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError:
        print(NEEDS, file=sys.stderr)
        raise SystemExit(1) from None
    from quanto_hf.cli.app import app
    from quanto_hf.ops.kernel import REFUSED

    if REFUSED:
        print(f"error: {REFUSED[0]}", file=sys.stderr)
        raise SystemExit(2)
    # --debug is an option of quanto-hf, but it is wanted after a command has failed: at the end of the line
    words = sys.argv[1:]
    if "--debug" in words:
        words = ["--debug", *(word for word in words if word != "--debug")]
    app(args=words, prog_name="quanto-hf")


__all__ = ["main"]
