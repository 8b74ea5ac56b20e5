"""The house stands: imports point down, public names are explained, examples run, and paths in texts exist."""

import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path

from taken_over import taken_over

import quanto_hf

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "quanto_hf"

# A room may import the rooms of a lower number, and its own.
ROOMS = {
    "assets": 0, "qtypes": 0, "ops": 1, "fit": 2, "schemes": 3, "nn": 4, "io": 5, "flow": 6, "eager": 7, "hf": 8,
    "cli": 9, "__main__": 10,
    # names of the rooms for a user; they stand above hf, as the package does
    "aqlm": 9, "compat": 9,
}  # fmt: skip
FOREIGN = ("optimum", "torch.ao", "torchao", "bitsandbytes")
FILES = sorted(PACKAGE.rglob("*.py"))
# Packages of an extra: what needs them is not tested where they are missing.
OPTIONAL = ("typer", "rich", "matplotlib", "peft", "triton", "huggingface_hub", "datasets")


def name_of(file):
    """The dotted name of a module."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file):
    """(line, dotted name) of everything that a file imports, inside of functions too."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            # "from quanto_hf import nn" imports a room as well
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def room(name):
    """The room of a dotted name inside the package, or None: the package itself, or a name that it exports."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "quanto_hf" and parts[1] in ROOMS else None


def test_every_part_of_the_package_is_a_known_room():
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__"} <= set(ROOMS)


def upward(file):
    """Imports of a file that point to a room above its own."""
    here = room(name_of(file))
    if here is None:
        # the package itself stands on top of all rooms
        return
    for line, name in imports(file):
        there = room(name)
        if name.split(".")[0] == "quanto_hf" and there is None:
            # the package stands above hf, and only the command line above the package
            allowed = here == "cli"
        else:
            allowed = there in (None, "assets", here) or ROOMS[there] < ROOMS[here]
        if not allowed:
            yield f"{file}:{line} imports {name}"


def foreign(file):
    """Imports of a file that are about to go away, or that nobody need have."""
    for line, name in imports(file):
        if any(f"{name}.".startswith(f"{f}.") for f in FOREIGN):
            yield f"{file}:{line} imports {name}"


def test_no_import_points_upward():
    assert [found for file in FILES for found in upward(file)] == []


def test_nothing_is_imported_that_is_about_to_go_away():
    assert [found for file in FILES for found in foreign(file)] == []


def typed_lines(file):
    """Lines of a file that only type checkers read."""
    blocks = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.If)]
    blocks = [node for node in blocks if "TYPE_CHECKING" in ast.unparse(node.test)]
    return {line for node in blocks for line in range(node.lineno, node.end_lineno + 1)}


def reachable(start, edges):
    """What imports lead to, from one module."""
    found, ahead = set(), [start]
    while ahead:
        new = edges[ahead.pop()] - found
        found |= new
        ahead += new
    return found


def test_no_modules_import_each_other():
    known = {name_of(file): file for file in FILES}
    edges = {}
    for name, file in known.items():
        typed = typed_lines(file)
        read = [found for line, found in imports(file) if line not in typed]
        edges[name] = {found if found in known else found.rpartition(".")[0] for found in read} & known.keys() - {name}
    assert {name for name in known if name in reachable(name, edges)} == set()


# The folders of `ops` that belong to a device. Nobody above `ops` names one: what is offered is in `quanto_hf.ops`.
DEVICES = ("quanto_hf.ops.cpu", "quanto_hf.ops.torch", "quanto_hf.ops.triton")


def test_nobody_above_the_ops_imports_a_device():
    found = [
        f"{name_of(file)}:{line} imports {name}"
        for file in FILES
        for line, name in imports(file)
        if room(name_of(file)) != "ops" and f"{name}.".startswith(tuple(f"{device}." for device in DEVICES))
    ]
    assert found == []


def test_the_registry_of_kernels_stands_below_the_devices():
    ops = PACKAGE / "ops"
    found = [
        f"{name_of(file)}:{line} imports {name}"
        for file in sorted(ops.glob("*.py"))
        if file.name != "__init__.py"
        for line, name in imports(file)
        if f"{name}.".startswith(tuple(f"{device}." for device in DEVICES))
    ]
    assert found == []


def test_the_reader_of_imports_sees_all_forms(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "quanto_hf" / "nn" / "example.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import torch.ao.quantization\nfrom quanto_hf import hf\nfrom ..flow import assign\nfrom . import registry\n"
        "def f():\n    from quanto_hf.cli import main\n"
    )
    assert sorted(name for _, name in imports(file)) == [
        "quanto_hf.cli.main", "quanto_hf.flow.assign", "quanto_hf.hf", "quanto_hf.nn.registry", "torch.ao.quantization",
    ]  # fmt: skip
    assert [found.partition(" imports ")[2] for found in upward(file)] == [
        "quanto_hf.hf", "quanto_hf.flow.assign", "quanto_hf.cli.main",
    ]  # fmt: skip
    assert [found.partition(" imports ")[2] for found in foreign(file)] == ["torch.ao.quantization"]


def is_explained(value):
    """Whether a public value, or the class of a number type, has a docstring that somebody wrote."""
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        value = type(value)
        assert value.__module__.startswith("quanto_hf")
    # that of a dataclass without one is its signature
    return bool(value.__doc__) and not value.__doc__.startswith(f"{value.__name__}(")


def test_every_public_name_is_explained():
    assert [name for name in quanto_hf.__all__ if not is_explained(getattr(quanto_hf, name))] == []


def test_the_public_names_are_sorted_and_unique():
    assert quanto_hf.__all__ == sorted(set(quanto_hf.__all__))


def test_no_file_is_longer_than_300_lines():
    long = {str(file.relative_to(ROOT)): text.count("\n") for file in FILES if (text := file.read_text("utf-8"))}
    assert {name: lines for name, lines in long.items() if lines > 300} == {}


def test_every_module_says_what_it_is():
    assert [str(file) for file in FILES if not ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))] == []


def failed_examples(file):
    """How many examples in docstrings of a file do not run as they say; 0 where a package of an extra is missing."""
    try:
        module = importlib.import_module(name_of(file))
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in OPTIONAL:
            raise
        return 0
    torch = importlib.import_module("torch")
    torch.manual_seed(0)  # for each file: an example does not depend on the ones before
    names = {"torch": torch, "nn": torch.nn}
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    return doctest.testmod(module, extraglobs=names, optionflags=flags).failed


def test_the_examples_in_docstrings_run():
    # importing __main__ runs the command line
    files = [file for file in FILES if file.name != "__main__.py"]
    # one of them has quanto_hf serve the QuantoConfig of transformers, which other tests find as it is
    with taken_over():
        assert [str(file) for file in files if failed_examples(file)] == []


# What makes a tensor from numbers, or from none, and takes torch's default dtype where it is not told another.
FACTORIES = {
    "arange", "as_tensor", "asarray", "bartlett_window", "blackman_window", "empty", "empty_permuted", "empty_strided",
    "eye", "full", "hamming_window", "hann_window", "kaiser_window", "linspace", "logspace", "normal", "ones", "rand",
    "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
# Of these even float32 may be made without a word.
LEGACY = {"Tensor", "FloatTensor", "DoubleTensor", "HalfTensor", "BFloat16Tensor"}
# Layers with parameters, which take the default dtype too.
LAYERS = re.compile(
    r"Linear|Bilinear|Embedding(Bag)?|(Lazy)?Conv\w+|\w*(Layer|Batch|Group|Instance|RMS)Norm\w*|LSTM|GRU|RNN"
)
# Where a user makes a layer and names no dtype, as that of torch would do.
MAY_ASK = {"quanto_hf/nn/twin.py"}
ASKS = "asks for the default dtype"
# Decorators of functions that make something once and keep it: it must not lie on the default device of the first call.
KEEPING = {"cache", "lru_cache", "_kept"}


def made_by_default(text):
    """(line, what is wrong) of each tensor and layer whose dtype is left to torch's default, and of each tensor that is
    kept and whose device is."""
    tree = ast.parse(text)
    kept = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and _decorators(function) & KEEPING
        if "neutral_settings" not in _decorators(function)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "get_default_dtype":
            yield node.lineno, ASKS
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        named = {keyword.arg for keyword in node.keywords}
        if owner == "torch" and name in LEGACY:
            yield node.lineno, f"torch.{name} takes no dtype"
        factory = owner == "torch" and name in FACTORIES
        if (factory or (owner in ("nn", "torch.nn") and LAYERS.fullmatch(name))) and "dtype" not in named:
            yield node.lineno, f"{owner}.{name} without a dtype"
        if factory and id(node) in kept and "device" not in named:
            yield node.lineno, f"torch.{name} is kept, without a device"


def _decorators(function):
    """Names of the decorators of a function, whatever they are called with."""
    called = [node.func if isinstance(node, ast.Call) else node for node in function.decorator_list]
    return {ast.unparse(node).rpartition(".")[2] for node in called}


def test_no_tensor_is_made_without_a_dtype():
    found = {str(file.relative_to(ROOT)): list(made_by_default(file.read_text(encoding="utf-8"))) for file in FILES}
    assert [
        f"{name}:{line} {what}"
        for name, places in found.items()
        for line, what in places
        if not (name in MAY_ASK and what == ASKS)
    ] == []


def test_the_reader_of_tensors_sees_all_forms():
    text = """
import torch
from torch import nn
a = torch.zeros(3), torch.rand(2, generator=g), torch.tensor([e], **how), torch.Tensor(3)
b = torch.zeros(3, dtype=torch.int8), nn.Linear(2, 2), nn.Linear(2, 2, dtype=a.dtype), torch.nn.Conv2d(1, 1, 1)
c = torch.get_default_dtype(), nn.ReLU(), nn.Parameter(a), a.new_zeros(3), torch.zeros_like(a)

@lru_cache(maxsize=2)
def d():
    return torch.ones(2, dtype=torch.int8), torch.ones(2, dtype=torch.int8, device="cpu")

@cache
@neutral_settings()
def e():
    return torch.ones(2, dtype=torch.int8)
"""
    assert sorted(made_by_default(text)) == [
        (4, "torch.Tensor takes no dtype"), (4, "torch.rand without a dtype"), (4, "torch.tensor without a dtype"),
        (4, "torch.zeros without a dtype"), (5, "nn.Linear without a dtype"), (5, "torch.nn.Conv2d without a dtype"),
        (6, ASKS), (10, "torch.ones is kept, without a device"),
    ]  # fmt: skip


TEXTS = [
    path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
    if path.exists()
]
TOP = ("quanto_hf", "tests", "docs", "examples", "benchmarks")


def paths_in(text):
    """What looks like a path of this repository between backticks."""
    return [
        found.rstrip("/")
        for found in re.findall(r"`([\w./*<>-]+)`", text)
        if found.split("/")[0] in TOP and "/" in found and not {*"<>*"} & {*found}
    ]


def test_paths_in_texts_exist():
    assert [
        f"{text.name}: {found}"
        for text in TEXTS
        for found in paths_in(text.read_text(encoding="utf-8"))
        if not (ROOT / found).exists()
    ] == []


def test_paths_in_texts_are_found():
    text = "see `docs/format.md`, `quanto_hf/nn/`, `tests/<room>`, `pip install x`, `a/b` and `quanto_hf.nn`"
    assert paths_in(text) == ["docs/format.md", "quanto_hf/nn"]
