"""Commands that run in this process silence transformers for good; each test gives it its voice back. Commands that
need a process of their own share one that has torch."""

import subprocess

import pytest
from forked import Program, run_all

MODULE = "import runpy; runpy.run_module('quanto_hf', run_name='__main__', alter_sys=True)"
WITHOUT = "import sys; sys.modules[{!r}] = None; from quanto_hf.cli import main; main()"
BENCH = "bench linear --features 48x64 --rows 1,12 --rounds 2 --weights int8,int4 --json"
# (program, words, what the environment has besides)
PROGRAMS = {
    "debug": (MODULE, "inspect /nowhere --debug", {}),
    "no debug": (MODULE, "inspect /nowhere", {"QUANTO_HF_DEBUG": "0"}),
    "no such level: kernels": (MODULE, "kernels", {"QUANTO_HF_CPU": "nonsense"}),
    "no such level: --version": (MODULE, "--version", {"QUANTO_HF_CPU": "nonsense"}),
    "without typer": (WITHOUT.format("typer"), "", {}),
    "without rich": (WITHOUT.format("rich"), "", {}),
    "QUANTO_HF_CPU": (MODULE, "kernels --weights int4", {"QUANTO_HF_CPU": "torch"}),
    "QUANTO_HF_REFERENCE": (MODULE, "kernels --weights int4", {"QUANTO_HF_REFERENCE": "1"}),
    "bench without the library": (MODULE, BENCH, {"QUANTO_HF_CPU": "torch"}),
}


@pytest.fixture(scope="session")
def done() -> dict[str, subprocess.CompletedProcess[str]]:
    """What became of each of the programs."""
    programs = [Program(code, more, words.split()) for code, words, more in PROGRAMS.values()]
    return dict(zip(PROGRAMS, run_all(programs), strict=True))


@pytest.fixture(autouse=True)
def _every_command(transformers_speaks_again):
    """See the fixture that it asks for."""
