"""The compiled module, and which instructions it uses."""

import logging
import os
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from quanto_hf.ops.kernel import DEVICES, REFUSED

logger = logging.getLogger("quanto_hf")

# Every level that the sources have, best first; a processor offers those that it has the instructions for.
LEVELS = (
    "amx",
    "avx512_bf16",
    "avx512_vnni",
    "avx512",
    "avx2",
    "neon_bf16",
    "neon_dotprod",
    "neon",
)


def _load() -> tuple[ModuleType | None, str]:
    """The module, or None and the sentence why.

    Raises:
        ValueError: ``QUANTO_HF_CPU`` names no level of this processor.
    """
    wanted = os.environ.get("QUANTO_HF_CPU", "").strip().lower()
    if wanted == "torch":
        return None, "QUANTO_HF_CPU=torch switches the native kernels off"
    try:
        # torch first: the module then uses torch's own OpenMP and follows torch.set_num_threads
        import torch  # noqa: F401

        from quanto_hf.ops.cpu import _native  # type: ignore[attr-defined]
    except ImportError as error:
        if find_spec("quanto_hf.ops.cpu._native") is not None:
            return None, f"the compiled module cannot be loaded: {error}"
        return None, "it was installed without a compiler; install a C++17 compiler and reinstall quanto-hf"
    offered = _native.levels()
    if wanted and wanted not in offered:
        choices = ", ".join([*offered, "torch"])
        raise ValueError(f"QUANTO_HF_CPU={wanted!r} is not a level of this processor; choose one of {choices}")
    if not offered:
        return None, "this processor has no AVX2 or NEON"
    if wanted:
        _native.use_level(wanted)
    return _native, f"level {_native.level()}"


NATIVE: ModuleType | None
# Set where the environment names a level that there is not. The first op raises it, not the import: the command line
# tells an error in a sentence, which it could not if it cannot be imported itself.
WRONG_LEVEL: str | None = None
try:
    NATIVE, REASON = _load()
except ValueError as error:
    NATIVE, REASON, WRONG_LEVEL = None, str(error), str(error)
    REFUSED.append(WRONG_LEVEL)
if NATIVE is None and WRONG_LEVEL is None:
    logger.info("quanto_hf runs without native CPU kernels: %s", REASON)


def label() -> str:
    """Names native kernels in a warning: their results depend on the level."""
    assert NATIVE is not None
    return f"native {NATIVE.level()}"


def describe() -> dict[str, Any]:
    """Whether there are native kernels, or why not, and the levels of instructions."""
    return {
        "native": NATIVE is not None,
        "why_not": None if NATIVE else REASON,
        "level": NATIVE.level() if NATIVE else None,
        "levels": NATIVE.levels() if NATIVE else [],
    }


DEVICES["cpu"] = describe
