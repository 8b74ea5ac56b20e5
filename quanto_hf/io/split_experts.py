"""Experts that a file holds under a name for each, where the config names the stack that a model makes of them."""

import re
from collections.abc import Mapping

from quanto_hf.schemes import Scheme, TensorSpec

# The stack, the number of the expert, and its projection.
ONE = re.compile(r"(?P<stack>.*)\.\d+\.[^.]+")


def by_expert(
    schemes: Mapping[str, Scheme], groups: Mapping[str, Mapping[str, TensorSpec]], prefix: str
) -> dict[str, Scheme]:
    """The schemes with each single expert in the files in the place of the stacks that it belongs to.

    The names in the files are those of the original checkpoint: gate and up projection of an expert are two tensors
    there, and what stands in front may be called otherwise. They belong to the stacks in a module with the same last
    name and the same numbers of layers; of these, to one whose scheme stores such tensors.

    Args:
        schemes: name of a slot -> its scheme.
        groups: name in the files -> its stored tensors, by their full names.
        prefix: of the names of stored tensors, in front of those of the scheme.
    """
    stacks: dict[tuple[str, ...], list[str]] = {}
    for label in schemes:
        if label not in groups:
            stacks.setdefault(_place(label.rpartition(".")[0]), []).append(label)
    found = dict(schemes)
    for name, tensors in groups.items():
        match = ONE.fullmatch(name)
        if name in schemes or match is None:
            continue
        parts = {tensor.removeprefix(f"{name}.{prefix}"): spec for tensor, spec in tensors.items()}
        for label in stacks.get(_place(match["stack"]), ()):
            if schemes[label].weight_of(parts) is not None:
                found[name] = schemes[label]
                break
        if name in found:
            # the stack itself is in no file
            for label in stacks[_place(match["stack"])]:
                found.pop(label, None)
    return found


def _place(module: str) -> tuple[str, ...]:
    return (module.rpartition(".")[2], *re.findall(r"\d+", module))
