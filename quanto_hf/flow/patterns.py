"""Module names matched by whole segments or globs, never by substring."""

import difflib
import fnmatch
import re
from collections.abc import Iterable
from functools import lru_cache

from quanto_hf.nn.slots import WEIGHT


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    # fnmatch.translate anchors at the end; its own text in between is what is wanted
    body = fnmatch.translate(pattern.removesuffix(f".{WEIGHT}"))
    body = re.sub(r"^\(\?s:(.*)\)\\[Zz]$", r"\1", body)
    return re.compile(rf"(?s:(^|.*\.)({body})(\..*)?\Z)")


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern names a module or a module that contains it.

    A pattern is a run of whole name segments, anywhere in the name; ``*``, ``?`` and ``[...]`` are as in a shell,
    and ``*`` also spans dots. A trailing ``.weight`` is ignored.

    Example:
        >>> matches("model.layers.0.mlp.fc1", "fc1"), matches("model.layers.0.mlp.fc10", "fc1")
        (True, False)
        >>> matches("model.layers.0.mlp.down_proj", "layers.*.down_proj"), matches("lm_head", "lm_head.weight")
        (True, True)
        >>> matches("model.layers.1.mlp.down_proj", "layers.1"), matches("model.layers.11.mlp", "layers.1")
        (True, False)
    """
    return _compiled(pattern).match(name) is not None


def names_itself(name: str, pattern: str) -> bool:
    """Whether a pattern names a module, and not only one that contains it: ``mlp`` and ``*`` do not name ``mlp.gate``.

    Example:
        >>> names_itself("model.embed_tokens", "embed_tokens"), names_itself("model.embed_tokens", "model")
        (True, False)
    """
    return matches(name, pattern) and not matches(name.rpartition(".")[0], pattern)


def any_names(names: Iterable[str], patterns: Iterable[str]) -> bool:
    """Whether a pattern names (:func:`names_itself`) something by one of its names."""
    patterns = list(patterns)
    return any(names_itself(name, pattern) for name in names for pattern in patterns)


def first_match(name: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that matches, or None."""
    return next((pattern for pattern in patterns if matches(name, pattern)), None)


def unmatched(names: list[str], patterns: Iterable[str]) -> list[str]:
    """A sentence with near misses for each pattern that matches none of the names."""
    sentences = []
    segments = sorted({segment for name in names for segment in name.split(".")})
    for pattern in patterns:
        if any(matches(name, pattern) for name in names):
            continue
        near = difflib.get_close_matches(pattern, names, n=3) or difflib.get_close_matches(
            pattern.rpartition(".")[2], segments, n=3
        )
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        sentences.append(f"the pattern {pattern!r} matches no module of this model{hint}")
    return sentences
