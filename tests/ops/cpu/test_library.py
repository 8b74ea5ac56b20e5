"""Which native kernels are in use: by the environment, by the processor, or none at all."""

import os
import subprocess

import pytest
from forked import Program, run_all
from native_weights import LEVELS, needs_native

from quanto_hf.ops.cpu import library
from quanto_hf.ops.cpu.library import LEVELS as EVERY_LEVEL
from quanto_hf.ops.cpu.library import NATIVE, REASON

# Layers are quantized, run and asked for gradients. Prints the level, the reason, and whether the native kernel ran.
PROGRAM = """
import torch
from torch import nn
from quanto_hf.nn import QLinear
from quanto_hf.ops import linear_op
from quanto_hf.ops.cpu.library import NATIVE, REASON
from quanto_hf.schemes import make_scheme

torch.set_num_threads(1)
for name in ("int8", "int4", "float8"):
    layer = QLinear.from_module(nn.Linear(200, 17), make_scheme(name))
    layer.freeze()
    for rows in (1, 20):
        x = torch.randn(rows, 200, requires_grad=True)
        expected = nn.functional.linear(x, layer.dequantized(), layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad, layer.dequantized().sum(0).expand(rows, -1), rtol=1e-4, atol=1e-4)
rows = linear_op.explain(x.detach(), layer.scheme.weight(layer.tensors(), 200), None)
print(NATIVE and NATIVE.level(), "|", REASON, "|", dict(rows)["native"])
"""
LOGGED = "import logging\nlogging.basicConfig(level=logging.INFO, format='%(levelname)s %(name)s %(message)s')\n"
MISSING = """
import importlib.machinery
known = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name == "quanto_hf.ops.cpu._native" else known(name, path, target)
importlib.machinery.PathFinder.find_spec = find_spec
"""


QUANTIZING = """
from quanto_hf.fit.aqlm import quantize_aqlm
from quanto_hf.schemes import make_scheme
import torch
said = []
for make in (make_scheme("int4").quantize, lambda w: quantize_aqlm(w, num_codebooks=1, nbits=2)):
    try:
        make(torch.randn(4, 64))
    except ValueError as error:
        said.append(str(error))
assert len(said) == 2 and all("'sse2'" in text for text in said), said
"""
BROKEN = """
import importlib.machinery
def exec_module(self, module, known=importlib.machinery.ExtensionFileLoader.create_module):
    if "_native" in self.name and "quanto_hf" in self.name:
        raise ImportError("libgomp.so.1: cannot open shared object file")
    return known(self, module)
importlib.machinery.ExtensionFileLoader.create_module = exec_module
"""
# (program, QUANTO_HF_CPU) of each process
PROGRAMS = {
    **{name: (LOGGED + PROGRAM, f" {name.upper()} ") for name in LEVELS},
    "torch": (LOGGED + PROGRAM, "torch"),
    "no such level": (PROGRAM, "sse2"),
    "quantizing, no such level": (QUANTIZING, "sse2"),
    "missing": (MISSING + LOGGED + PROGRAM, None),
    "missing, nobody asked": (MISSING + "import quanto_hf.ops", None),
    "broken": (BROKEN + LOGGED + PROGRAM, None),
    "maps": ("import torch, quanto_hf.ops; torch.ones(1); print(open('/proc/self/maps').read())", None),
}
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def done() -> dict[str, Done]:
    """What became of each program."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("QUANTO_HF")}
    programs = [Program(code, {"QUANTO_HF_CPU": level} if level else {}) for code, level in PROGRAMS.values()]
    # torch.distributed.tensor: torch.testing imports it at its first comparison
    shared = ("torch", "torch.distributed.tensor", "transformers")
    return dict(zip(PROGRAMS, run_all(programs, shared, ["-W", "error::RuntimeWarning"], bare), strict=True))


def said(result: Done) -> tuple[list[str], list[str]]:
    """The three answers of the program, and the lines that quanto_hf logged."""
    assert result.returncode == 0, result.stderr[-2000:]
    logged = [line for line in result.stderr.splitlines() if " quanto_hf " in line]
    return [part.strip() for part in result.stdout.splitlines()[-1].split("|")], logged


@needs_native
def test_the_best_level_of_the_processor_is_used():
    if "QUANTO_HF_CPU" not in os.environ:
        assert NATIVE.level() == LEVELS[0]
        assert REASON == f"level {LEVELS[0]}"
    assert [name for name in EVERY_LEVEL if name in LEVELS] == LEVELS


@needs_native
@pytest.mark.parametrize("name", LEVELS)
def test_the_environment_chooses_a_level(name: str, done: dict[str, Done]):
    answers, logged = said(done[name])
    assert answers == [name, f"level {name}", "runs"]
    assert not logged


def test_the_environment_switches_the_native_kernels_off(done: dict[str, Done]):
    answers, logged = said(done["torch"])
    sentence = "QUANTO_HF_CPU=torch switches the native kernels off"
    assert answers == ["None", sentence, sentence]
    assert logged == [f"INFO quanto_hf quanto_hf runs without native CPU kernels: {sentence}"]


@needs_native
def test_a_level_that_there_is_not_is_an_error_with_the_choices(done: dict[str, Done], monkeypatch):
    result = done["no such level"]
    assert result.returncode != 0
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ValueError") and "'sse2'" in last
    assert all(choice in last for choice in (*LEVELS, "torch"))
    monkeypatch.setenv("QUANTO_HF_CPU", "nonsense")
    with pytest.raises(ValueError, match="'nonsense'"):
        library._load()


def test_quantizing_does_not_go_on_without_a_level_that_there_is_not(done: dict[str, Done]):
    result = done["quantizing, no such level"]
    assert result.returncode == 0, result.stderr


def test_an_empty_choice_is_none(monkeypatch):
    monkeypatch.delenv("QUANTO_HF_CPU", raising=False)
    without = library._load()
    monkeypatch.setenv("QUANTO_HF_CPU", " ")
    assert library._load() == without and without[1]


def test_without_the_compiled_module_one_line_says_so_and_everything_works(done: dict[str, Done]):
    answers, logged = said(done["missing"])
    assert answers[0] == "None" and answers[1] == answers[2]
    assert "install a C++17 compiler and reinstall quanto-hf" in answers[1]
    assert logged == [f"INFO quanto_hf quanto_hf runs without native CPU kernels: {answers[1]}"]


def test_nobody_hears_of_it_who_did_not_ask(done: dict[str, Done]):
    result = done["missing, nobody asked"]
    assert result.returncode == 0 and not result.stderr


@needs_native
def test_a_module_that_cannot_be_loaded_says_why(done: dict[str, Done]):
    answers, logged = said(done["broken"])
    sentence = "the compiled module cannot be loaded: libgomp.so.1: cannot open shared object file"
    assert answers == ["None", sentence, sentence]
    assert len(logged) == 1


@needs_native
def test_the_module_refuses_a_level_or_a_call_that_it_does_not_know():
    with pytest.raises(ValueError, match="does not offer 'nonsense'"):
        NATIVE.use_level("nonsense")
    for name in ("linear", "dequantize"):
        with pytest.raises(TypeError, match=r"expected 1[45] integers, got 1"):
            getattr(NATIVE, name)(1)
    assert NATIVE.level() in LEVELS


@needs_native
def test_the_module_follows_the_threads_of_torch(done: dict[str, Done]):
    # two OpenMP libraries in one process would each have threads of their own
    maps = "/proc/self/maps"
    if not os.path.exists(maps):
        pytest.skip("no list of loaded libraries on this system")
    # a new process: scikit-learn, which other tests import, brings a copy of its own
    loaded = {line.split("/", 1)[1].strip() for line in done["maps"].stdout.splitlines() if "/" in line}
    assert len({path for path in loaded if "gomp" in path or "iomp" in path or "/libomp" in path}) == 1
