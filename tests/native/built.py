"""Runs the checks of test_kernels.cpp on the kernels of a compiled module: built.py MODULE CHECKS [arguments]."""

import ctypes
import importlib.util
import sys
from importlib.machinery import ExtensionFileLoader

module, checks, *arguments = sys.argv[1:]
loader = ExtensionFileLoader("_native", module)
spec = importlib.util.spec_from_loader("_native", loader)
native = importlib.util.module_from_spec(spec)
if not hasattr(native, "entry_points"):
    sys.exit(f"FAILED: {module} is of an older version; build it again")
words = [b"test_kernels", *(argument.encode() for argument in arguments)]
sys.exit(
    ctypes.CDLL(checks).check_module(
        ctypes.c_void_p(native.entry_points()), len(words), (ctypes.c_char_p * len(words))(*words)
    )
)
