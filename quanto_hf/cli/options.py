"""What ``kernels`` and ``bench`` read from the command line in the same way."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from quanto_hf.qtypes import QType
    from quanto_hf.schemes import Grouped, Scheme

DTYPES = ("float32", "bfloat16", "float16")


class WrongUsage(ValueError):
    """A word of the command line that cannot be: told in a line, exit code 2."""


def words(values: list[str] | None) -> list[str]:
    """Words that were given one by one or with commas between, each once.

    Example:
        >>> words(["int8,int4", "int2", "int8"])
        ['int8', 'int4', 'int2']
    """
    found = (word.strip() for value in values or [] for word in value.split(","))
    return list(dict.fromkeys(word for word in found if word))


def whole_numbers(name: str, values: list[str]) -> list[int]:
    """Numbers above 0; ``name`` is the option that is told."""
    found = words(values)
    if not found or not all(word.isdecimal() and int(word) > 0 for word in found):
        raise WrongUsage(f"{name} {','.join(values)} is not a list of whole numbers above 0, such as 1,128")
    return [int(word) for word in found]


def features(text: str) -> tuple[int, int]:
    """Rows and columns of a weight.

    Example:
        >>> features("11008x4096")
        (11008, 4096)
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise WrongUsage(f"--features {text} is not OUTxIN, such as 11008x4096")
    return int(parts[0]), int(parts[1])


def float_dtype(name: str) -> "torch.dtype":
    """The dtype of a name."""
    import torch

    if name not in DTYPES:
        raise WrongUsage(f"--dtype {name} is not known; choose one of {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, name)
    return found


def schemes(weights: list[str] | None, group_size: int | None = None) -> "list[Scheme]":
    """The schemes of names. Without names those of all number types, as far as they can have the group size, and,
    where none is given, the examples of other schemes.

    Example:
        >>> schemes(["int8,aqlm-2x8"])
        [Affine(qtype='int8', group_size=-1, symmetric=True),
         Aqlm(num_codebooks=2, nbits=8, out_group=1, in_group=8)]
    """
    from quanto_hf.qtypes import QTYPES
    from quanto_hf.schemes import SCHEMES, make_scheme

    named, found = words(weights), []
    others = [] if group_size is not None else [name for cls in SCHEMES.values() for name in cls.examples]
    for name in named or [*QTYPES, *others]:
        try:
            found.append(make_scheme(name, group_size))
        except ValueError as error:
            if named:
                raise WrongUsage(f"--weights {name}: {error}") from None
    if not found:
        raise WrongUsage(f"--group-size {group_size}: no number type has groups of this size")
    return found


def number_types(weights: list[str] | None) -> "list[Grouped]":
    """The schemes of number types. Without names those of the common ones."""
    from quanto_hf.qtypes import common_names
    from quanto_hf.schemes import Grouped

    found = schemes(words(weights) or common_names())
    grouped = [scheme for scheme in found if isinstance(scheme, Grouped)]
    if other := next((scheme for scheme in found if scheme not in grouped), None):
        raise WrongUsage(f"--weights {other}: it is no number type; benchmarks/aqlm.py times AQLM layouts")
    return grouped


def activation_types(activations: list[str] | None) -> "list[QType]":
    """The number types of x."""
    from quanto_hf.flow import activation_type

    found = []
    for name in words(activations):
        try:
            found.append(activation_type(name))
        except ValueError as error:
            raise WrongUsage(f"--activations {name}: {error}") from None
    return [kind for kind in found if kind is not None]


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """This many threads of torch, or as many as there are; gives their number."""
    import torch

    before = torch.get_num_threads()
    if count is not None and count < 1:
        raise WrongUsage(f"--threads {count} is below 1")
    torch.set_num_threads(before if count is None else count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
