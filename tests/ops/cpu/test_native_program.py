"""The test program of the native kernels, which needs no Python, holds: here, with sanitizers, and on emulated ARM."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
from native_weights import LEVELS, needs_native

from quanto_hf.ops.cpu.library import NATIVE

RUN = Path(__file__).parents[2] / "native" / "run"


def need(*programs: str) -> None:
    """Skips the test where a program is missing."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} is not installed")
    if sys.platform != "linux":
        pytest.skip("tests/native/run takes the flags of compilers on Linux")


def start(mode: str, *arguments: str, compiler: str, build: Path) -> subprocess.CompletedProcess[str]:
    """What became of tests/native/run."""
    module = {"MODULE": NATIVE.__file__, "PYTHON": sys.executable} if NATIVE else {}
    environment = {**os.environ, **module, "CXX": compiler, "BUILD": str(build)}
    return subprocess.run([RUN, mode, *arguments], capture_output=True, text=True, env=environment)


def run(mode: str, *arguments: str, compiler: str, build: Path) -> list[str]:
    """The lines that the program prints; it must succeed."""
    result = start(mode, *arguments, compiler=compiler, build=build)
    said = [line for line in result.stdout.splitlines() if not line.startswith("call: ")]
    assert result.returncode == 0, "\n".join([*said, result.stderr])[-4000:]
    lines = result.stdout.splitlines()
    assert lines[-1].endswith("calls, 0 failures")
    return lines


def compiler() -> str:
    """The C++ compiler of this machine, or a skip."""
    name = os.environ.get("CXX") or "c++"
    need("bash", name)
    return name


# What is covered: each level of this processor makes each of these calls, among others, and every result is compared.
# Codes, how they are stored or found, dtype, rows of x (0: there is no x).
FLOATS = ("f32", "bf16", "f16")
ROWS = (1, 2, 7, 8, 15, 16, 17, 32, 33, 64, 127, 512)
CODES = ("int8", "e4m3", "e5m2", "table4", "table2")
WEIGHTS = ("rows", "rows-zero", "grouped", "grouped-zero")
SCALES = ("dynamic", "dynamic-zero", "static", "static-zero")


def calls(*parts: Sequence[object]) -> list[str]:
    """Each combination, as the program prints it."""
    return [" ".join(map(str, call)) for call in product(*parts)]


COVERED = {
    "linear": calls(CODES, WEIGHTS, FLOATS, ROWS),
    "dequantize": calls(CODES, WEIGHTS, FLOATS, [0]),
    "dequantize_rows": calls(CODES, WEIGHTS, FLOATS, [0]),
    "linear_int8": calls(["int8"], ["dynamic", "static"], FLOATS, ROWS),
    "linear_int8_groups": calls(["table4", "table2"], SCALES, FLOATS, ROWS),
    "expert_linear": calls(CODES, ["grouped", "grouped-zero"], FLOATS, [1, 7, 60]),
    "quantize": [
        *calls([*CODES, "lookup"], ["range", "mse"], FLOATS, [0]),
        *calls(["int8", "table4", "table2"], ["range-zero", "mse-zero", "hqq-zero"], FLOATS, [0]),
    ],
    "aqlm_linear": calls(["aqlm"], FLOATS, FLOATS, ROWS),
    "aqlm_dequantize": calls(["aqlm"], FLOATS, FLOATS, [0]),
    "aqlm_search": calls(["width8", "other"], ["search"], ["f32"], [0]),
    "aqlm_sweep": calls(["width8", "other"], ["weight", "codes"], ["f32"], [0]),
    "product": calls(["f32"], ["product"], ["f32"], [0]),
}
LACKING = {
    "neon": {"linear_int8", "linear_int8_groups"},
    "neon_dotprod": {"linear_int8_groups"},
    "neon_bf16": {"linear_int8_groups"},
}


@needs_native
def test_every_kernel_of_every_level_agrees_with_float64_and_stays_inside_of_its_memory(tmp_path: Path) -> None:
    name = compiler()
    # the built module's kernels: compiling them again takes minutes, the checks of four levels 20 s
    lines = run("built", "--small", "--calls", compiler=name, build=tmp_path)
    assert lines[0] == f"levels: {' '.join(LEVELS)}"
    made = {line.removeprefix("call: ") for line in lines if line.startswith("call: ")}
    wanted = {
        f"{level} {kernel} {call}"
        for level in LEVELS
        for kernel in COVERED.keys() - LACKING.get(level, set())
        for call in COVERED[kernel]
    }
    missing = sorted(wanted - made)
    assert not missing
    assert "every code_sums f32 sums f32 0" in made
    # a kernel that is called and not named above has no list of what is covered
    assert {call.split()[1] for call in made} <= {*COVERED, "code_sums"}
    # a level that is asked for and missing is no success
    result = start("built", "no_such_level", compiler=name, build=tmp_path)
    assert result.returncode == 1 and "does not offer all the levels" in result.stdout


@pytest.mark.sanitizer
def test_the_kernels_hold_for_all_shapes(tmp_path: Path) -> None:
    run("plain", compiler=compiler(), build=tmp_path)


@pytest.mark.sanitizer
def test_the_amx_level_holds_with_its_tiles_emulated(tmp_path: Path) -> None:
    if "avx512_bf16" not in LEVELS:
        pytest.skip("the rest of the AMX level needs AVX-512 BF16")
    run("amx", compiler=compiler(), build=tmp_path)


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
