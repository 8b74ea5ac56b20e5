"""The test program of the native kernels, which needs no Python, holds: here, with sanitizers, and on emulated ARM."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quanto_hf.ops.cpu.library import NATIVE, REASON

RUN = Path(__file__).parents[2] / "native" / "run"


def need(*programs: str) -> None:
    """Skips the test where a program is missing."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} is not installed")
    if sys.platform != "linux":
        pytest.skip("tests/native/run takes the flags of compilers on Linux")


def run(mode: str, *arguments: str, compiler: str, build: Path) -> list[str]:
    """The lines that the program prints; it must succeed."""
    environment = {**os.environ, "CXX": compiler, "BUILD": str(build)}
    result = subprocess.run([RUN, mode, *arguments], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    lines = result.stdout.splitlines()
    assert lines[-1].endswith("calls, 0 failures")
    return lines


def compiler() -> str:
    """The C++ compiler of this machine, or a skip."""
    name = os.environ.get("CXX") or "c++"
    need("bash", name)
    return name


def test_the_kernels_in_use_agree_with_float64_and_stay_inside_of_their_memory(tmp_path: Path) -> None:
    # one level: all of them take 4 minutes on 2 cores (pytest -m sanitizer)
    name = compiler()
    if NATIVE is None:
        pytest.skip(REASON)
    lines = run("plain", "--small", NATIVE.level(), compiler=name, build=tmp_path)
    assert lines[0].startswith("levels: ")
    # a level that is asked for and missing is no success
    result = subprocess.run([tmp_path / "test_kernels", "no_such_level"], capture_output=True, text=True)
    assert result.returncode == 1 and "does not offer all the levels" in result.stdout


@pytest.mark.sanitizer
def test_the_kernels_hold_for_all_shapes(tmp_path: Path) -> None:
    run("plain", compiler=compiler(), build=tmp_path)


@pytest.mark.sanitizer
def test_the_sanitizers_find_nothing(tmp_path: Path) -> None:
    name = compiler()
    probe = subprocess.run(
        [name, "-fsanitize=address,undefined", "-fopenmp", "-x", "c++", "-", "-o", tmp_path / "probe"],
        input="int main() {}",
        capture_output=True,
        text=True,
    )
    if probe.returncode:
        pytest.skip(f"{name} comes without the libraries of the sanitizers")
    run("asan", "--small", compiler=name, build=tmp_path)


@pytest.mark.cross
def test_the_kernels_for_arm_hold_in_an_emulator(tmp_path: Path) -> None:
    need("bash", "aarch64-linux-gnu-g++", "qemu-aarch64")
    lines = run("aarch64", compiler="aarch64-linux-gnu-g++", build=tmp_path)
    # processors with everything, with FEAT_DotProd at most, and with neither
    offered = [line for line in lines if line.startswith("levels: ")]
    assert offered == ["levels: neon_bf16 neon_dotprod neon", "levels: neon_dotprod neon", "levels: neon"]
    assert len([line for line in lines if line.endswith(" calls, 0 failures")]) == 3
