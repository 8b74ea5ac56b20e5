"""What this machine offers to the kernels, and what the environment asks for."""

import os
import platform
from pathlib import Path
from typing import Any

# Of the flags of a processor, those that a kernel of ours or of torch may use.
FLAGS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
ENVIRONMENT = ("QUANTO_HF_CPU", "QUANTO_HF_REFERENCE")


def machine() -> dict[str, Any]:
    """Processor, features, levels, threads and environment, in JSON types."""
    import torch

    from quanto_hf.ops import DEVICES

    (name, flags), found = processor(), DEVICES["cpu"]()
    return {
        "processor": name,
        "features": flags,
        "torch": torch.__version__,
        "torch_level": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "native": found["native"],
        "why_not": found["why_not"],
        "what_to_do": None if found["native"] else advice(),
        "level": found["level"],
        "levels": found["levels"],
        "environment": {key: os.environ[key] for key in ENVIRONMENT if key in os.environ},
    }


def processor() -> tuple[str, list[str]]:
    """Its name, and those of its features that matter; none are known outside of Linux."""
    info: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            info.setdefault(key.strip().lower(), value.strip())
    except OSError:
        pass
    flags = info.get("flags", info.get("features", "")).split()
    name = info.get("model name") or platform.processor() or "unknown"
    return f"{name} ({platform.machine()})", [flag for flag in FLAGS if flag in flags]


def advice() -> str:
    """What to do where there are no native kernels."""
    if os.environ.get("QUANTO_HF_CPU", "").strip().lower() == "torch":
        return "unset QUANTO_HF_CPU to use them; until then kernels in plain torch serve"
    return "kernels in plain torch serve: the results are the same within rounding, but slower"


def lines(found: dict[str, Any]) -> list[str]:
    """:func:`machine` for people."""
    made = [
        f"processor  {found['processor']}: {' '.join(found['features']) or 'features are not known here'}",
        f"torch      {found['torch']}, level {found['torch_level']}, "
        f"{found['threads']} of {found['cores']} cores in use",
    ]
    if found["native"]:
        levels = ", ".join(found["levels"])
        made.append(f"native     level {found['level']} in use; this processor offers {levels} (QUANTO_HF_CPU chooses)")
    else:
        made.append(f"native     no kernels: {found['why_not']}")
        made.append(f"           {found['what_to_do']}")
    made += [f"set        {key}={value}" for key, value in found["environment"].items()]
    return made
