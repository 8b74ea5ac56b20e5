"""Tables, numbers and progress bars."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

# what a table needs where no terminal has a width: in a pipe or a file
PIPE_WIDTH = 180


def console() -> Console:
    """Standard output; wide where it is no terminal, so that a table is not folded in a file."""
    made = Console(highlight=False)
    return made if made.is_terminal else Console(highlight=False, width=PIPE_WIDTH)


def progress() -> Progress:
    """A progress bar on stderr that vanishes when done; nothing where stderr is no terminal."""
    err = Console(stderr=True)
    percent = TextColumn("{task.percentage:3.0f}%")
    columns = (TextColumn("{task.description}"), BarColumn(), percent, TimeElapsedColumn())
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)


def table(title: str, left: list[str], right: list[str], last: list[str] | None = None) -> Table:
    """An empty table: columns of text, of numbers, of text."""
    made = Table(title=title, title_justify="left")
    for name in left:
        made.add_column(name, overflow="fold")
    for name in right:
        made.add_column(name, justify="right")
    for name in last or []:
        made.add_column(name, overflow="ellipsis", no_wrap=True, max_width=50)
    return made


def size(nbytes: int) -> str:
    """Bytes for people.

    Example:
        >>> size(999), size(4_594_232), size(13_000_000_000)
        ('999 B', '4.59 MB', '13.00 GB')
    """
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{nbytes} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"
