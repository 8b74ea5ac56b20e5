"""The version of transformers that is needed, asked when this module is imported: before anything of it is used."""

import transformers
from packaging.version import InvalidVersion, Version

# as in pyproject.toml
TRANSFORMERS = "5.21"


def check_transformers(found: str) -> None:
    """Raise ImportError if transformers is too old.

    Args:
        found: its version. What is no version, of a build of one's own, is let through.

    Example:
        >>> check_transformers("5.21.0.dev0")
    """
    try:
        release = Version(found).release
    except (InvalidVersion, TypeError):
        return
    if release < Version(TRANSFORMERS).release:
        raise ImportError(
            f"quanto_hf needs transformers {TRANSFORMERS} or later, and {found} is installed: "
            f"pip install --upgrade 'transformers>={TRANSFORMERS}'"
        )


check_transformers(getattr(transformers, "__version__", ""))
