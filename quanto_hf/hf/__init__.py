"""The face to transformers: the config, the quantizer, and what replaces layers.

Imports: every room above. The quantizer itself is imported when transformers' quantizers are.
"""

from importlib import import_module
from typing import Any

# first: an error that says which transformers is needed, and not the first thing that an older one lacks
import quanto_hf.hf.config.requirements  # noqa: F401  # isort: skip
from quanto_hf.hf.config.aqlm import AqlmConfig
from quanto_hf.hf.config.quanto import METHOD, QuantoConfig
from quanto_hf.hf.load.adopt import quantize
from quanto_hf.hf.load.load_and_quantize import load_and_quantize_model
from quanto_hf.hf.load.register import install, register, register_format

__all__ = [
    "METHOD",
    "AqlmConfig",
    "QuantoConfig",
    "QuantoHfQuantizer",
    "convert_checkpoint",
    "install",
    "load_and_quantize_model",
    "plan",
    "quantize",
    "register",
    "register_format",
    "replace_with_aqlm_linear",
    "replace_with_quanto_layers",
]


# these import transformers' quantizers and accelerate: 1 s that `import quanto_hf` does not take
_LAZY = {
    "QuantoHfQuantizer": "quanto_hf.hf.load.quantizer",
    "convert_checkpoint": "quanto_hf.hf.convert.convert",
    "plan": "quanto_hf.hf.memory.planning",
    "replace_with_aqlm_linear": "quanto_hf.hf.load.aqlm",
    "replace_with_quanto_layers": "quanto_hf.hf.load.replace",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
