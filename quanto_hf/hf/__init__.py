"""The face to transformers: the config, the quantizer, and what replaces layers.

Imports: every room above. The quantizer itself is imported when transformers' quantizers are.
"""

from typing import Any

from quanto_hf.hf.config import METHOD, QuantoConfig
from quanto_hf.hf.load import load_and_quantize_model
from quanto_hf.hf.register import install, register

__all__ = [
    "METHOD",
    "QuantoConfig",
    "QuantoHfQuantizer",
    "install",
    "load_and_quantize_model",
    "register",
    "replace_with_quanto_layers",
]


def __getattr__(name: str) -> Any:
    # these import transformers' quantizers and accelerate: 1 s that `import quanto_hf` does not take
    if name == "QuantoHfQuantizer":
        from quanto_hf.hf.quantizer import QuantoHfQuantizer

        return QuantoHfQuantizer
    if name == "replace_with_quanto_layers":
        from quanto_hf.hf.replace import replace_with_quanto_layers

        return replace_with_quanto_layers
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
