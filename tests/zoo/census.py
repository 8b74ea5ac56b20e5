"""The classes of the installed transformers that keep the weights of many layers stacked in one parameter: experts, and
others with a parameter of three dimensions."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

from quanto_hf.nn import why_no_qmodule
from quanto_hf.nn.registry import entry_of

from .shrink import parts

MAKERS = {"empty", "zeros", "ones", "randn", "rand", "full", "tensor"}
# sizes of a module that takes numbers, those that are not 64
SIZES = {"num_experts": 4, "output_size": 128}


class Stacked(NamedTuple):
    """A class with stacked weights: ``family.Class`` and the shapes of its parameters as the source has them."""

    family: str
    name: str
    shapes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.family}.{self.name}"


def stacked() -> Iterator[Stacked]:
    """All of them, from the source of each modeling file: classes called Experts, classes that transformers decorates
    as such, and those with a parameter of three dimensions of which the first is not 1."""
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef):
                continue
            shapes = tuple(_shapes(node))
            decorated = any("use_experts_implementation" in ast.unparse(each) for each in node.decorator_list)
            if node.name.endswith("Experts") or decorated or shapes:
                yield Stacked(file.parent.name, node.name, shapes)


def _shapes(node: ast.ClassDef) -> Iterator[str]:
    for call in ast.walk(node):
        if not isinstance(call, ast.Call) or _last(call.func) != "Parameter" or not call.args:
            continue
        made = (m for m in ast.walk(call.args[0]) if isinstance(m, ast.Call) and _last(m.func) in MAKERS)
        if (inner := next(made, None)) is None:
            continue
        sizes = inner.args
        if len(sizes) == 1 and isinstance(sizes[0], ast.Tuple | ast.List):
            sizes = sizes[0].elts
        if len(sizes) > 2 and ast.unparse(sizes[0]) != "1":
            yield f"({', '.join(ast.unparse(size).replace('self.', '').replace('config.', '') for size in sizes)})"


def _last(node: ast.expr) -> str:
    return ast.unparse(node).rpartition(".")[-1]


def instance(found: Stacked) -> nn.Module:
    """A module of the class on meta, of the default config of its family or a part of it, whichever it can be made of.

    Raises:
        LookupError: it can be made of none.
    """
    cls = getattr(importlib.import_module(f"transformers.models.{found.family}.modeling_{found.family}"), found.name)
    asked = inspect.signature(cls).parameters.values()
    needed = [x.name for x in asked if x.default is x.empty and x.kind is x.POSITIONAL_OR_KEYWORD]
    sizes = {name: SIZES.get(name, 64) for name in needed if name != "config"}
    said: Any = None
    for config in _configs(found.family) if "config" in needed else [None]:
        for used in (config, Filled(config)):
            try:
                with torch.device("meta"):
                    module: nn.Module = cls(**sizes) if config is None else cls(config=used, **sizes)
                return module
            except Exception as error:
                said = error
    raise LookupError(f"{found} cannot be made of a config of {found.family}: {said}")


class Filled:
    """A config in which every size has a value: families that need not have experts have none by default."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._config, name, None)
        return 8 if value is None else value


def _configs(family: str) -> Iterator[Any]:
    for model_type in CONFIG_MAPPING_NAMES:
        if model_type_to_module_name(model_type) == family:
            yield from parts(CONFIG_MAPPING[model_type]())


def uncovered(module: nn.Module) -> list[str]:
    """Parameters of two dimensions and more, in a module or in what it holds, that have no quantized form."""
    names = []
    for owner, each in module.named_modules():
        found = None if why_no_qmodule(each) else entry_of(each)
        slots = () if found is None else found.quantized.slot_names
        large = (leaf for leaf, weight in each.named_parameters(recurse=False) if weight.dim() > 1)
        names += [f"{owner}.{leaf}".lstrip(".") for leaf in large if leaf not in slots and "bias" not in leaf]
    return names
