"""Builds the native CPU kernels. Optional: where there is no compiler the installation goes on without them."""

import os
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("quanto_hf/ops/cpu/csrc")
# -ffp-contract=off: a product and a sum are fused only where the source says so, so that every compiler and every
# level of instructions computes the same weights.
# -g0: Python's own flags ask for debug symbols, ten times the size of the code.
UNIX = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off", "-Wall", "-Wextra"]
# GCC 12 takes the undefined registers of its own intrinsics for mistakes of ours.
GCC_NOISE = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]


class Build(build_ext):
    """Flags by compiler: torch's OpenMP on Linux, Grand Central Dispatch on macOS, vcomp on Windows.

    One compiler runs for each core: the sources take about 100 s one after another.
    """

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type == "msvc":
            ext.extra_compile_args += ["/std:c++17", "/O2", "/openmp", "/EHsc"]
        elif sys.platform == "darwin":
            ext.extra_compile_args += UNIX
        else:
            ext.extra_compile_args += [*UNIX, *GCC_NOISE, "-fopenmp"]
            ext.extra_link_args += ["-fopenmp"]
        one_after_another = self.compiler.compile

        def side_by_side(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = pool.map(lambda source: one_after_another([source], **options), sources)
                return [name for names in made for name in names]

        self.compiler.compile = side_by_side
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = one_after_another


# By this tests/native/run knows whether a built module is that of its sources.
digest = sha256(b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.*")))).hexdigest()
# One binary for all versions of Python, but for builds without a global lock, which have no stable interface yet.
stable = not sysconfig.get_config_var("Py_GIL_DISABLED")
native = Extension(
    "quanto_hf.ops.cpu._native",
    sources=sorted(path.as_posix() for path in SOURCES.glob("*.cpp")),
    depends=sorted(path.as_posix() for path in SOURCES.glob("*.h")),
    define_macros=[("QUANTO_SOURCES", f"0x{digest[:15]}")],
    language="c++",
    # wheels for others must have it: there a mistake in the build is an error
    optional=os.environ.get("QUANTO_HF_NATIVE") != "required",
    py_limited_api=stable,
)
setup(
    ext_modules=[native],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if stable else {},
)
