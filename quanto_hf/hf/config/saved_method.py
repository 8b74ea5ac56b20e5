"""The method that a config.json names: transformers ignores one that it does not know, and loads packed weights as
random floats."""

from collections.abc import Mapping
from typing import Any

from quanto_hf.hf.config.aqlm import AQLM_METHOD, SIZES
from quanto_hf.hf.config.quanto import METHOD, SKELETON_METHOD

OURS = {"schemes", "format_version"}


def check_method(config: Any) -> None:
    """Refuse the quantization config of a checkpoint that is ours by its other keys, and names another method; or none.

    Args:
        config: as it stands in config.json.

    Raises:
        ValueError: names the key, and what it has to be.
    """
    if not isinstance(config, Mapping):
        if hasattr(config, "get"):
            return
        raise ValueError(f"quantization_config in config.json is an object with keys, and not {config!r}")
    method, keys = config.get("quant_method"), set(config)
    allowed: tuple[str, ...] = ()
    if OURS <= keys:
        allowed = (METHOD, SKELETON_METHOD)
    elif set(SIZES) <= keys:
        allowed = (AQLM_METHOD,)
    # the methods of transformers are an enum of strings
    named = isinstance(method, str)
    if (allowed and method not in allowed) or not (named or method is None):
        text = f"; by its other keys it is {allowed[0]!r}" if allowed else ", and has to be a string"
        raise ValueError(f"quant_method={method!r} in the quantization_config of config.json is not known{text}")
