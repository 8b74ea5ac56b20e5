"""The native library is chosen by the processor, forced by QUANTO_HF_CPU, and may be missing."""

import os
import subprocess
import sys

import pytest

from quanto_hf.ops.cpu.library import LEVELS, NATIVE

CODE = """
import logging; logging.basicConfig(level=logging.INFO)
import torch, quanto_hf
from quanto_hf.ops import linear_op
from quanto_hf.ops.cpu.library import NATIVE, REASON
print("level", NATIVE and NATIVE.level(), REASON)
args = linear_op.samples(0)[0]
torch.testing.assert_close(linear_op(*args), linear_op.reference(*args))
print([name for name, sentence in linear_op.explain(*args) if sentence == "runs"])
"""


def run(code: str = CODE, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("QUANTO_HF_CPU", "QUANTO_HF_REFERENCE")}
    return subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)


@pytest.mark.skipif(NATIVE is None, reason="no native kernels here")
def test_every_level_of_this_processor_can_be_forced():
    assert NATIVE.levels() and set(NATIVE.levels()) <= set(LEVELS)
    for level in NATIVE.levels():
        done = run(QUANTO_HF_CPU=level)
        assert f"level {level}" in done.stdout and "['native']" in done.stdout, done.stderr


def test_torch_switches_the_native_kernels_off_and_says_so():
    done = run(QUANTO_HF_CPU="torch")
    assert "level None" in done.stdout and "torch_blocks" in done.stdout
    assert "QUANTO_HF_CPU=torch" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(NATIVE is None, reason="no native kernels here")
def test_an_unknown_level_is_an_error_with_the_choices():
    done = run(QUANTO_HF_CPU="mmx")
    assert done.returncode != 0
    assert "QUANTO_HF_CPU='mmx'" in done.stderr and "choose one of" in done.stderr and "torch" in done.stderr


def test_without_the_library_everything_works_and_one_line_says_why():
    done = run("import sys; sys.modules['quanto_hf.ops.cpu._native'] = None\n" + CODE)
    assert "level None" in done.stdout and "torch_blocks" in done.stdout, done.stderr
    assert done.stderr.count("without native CPU kernels") == 1
