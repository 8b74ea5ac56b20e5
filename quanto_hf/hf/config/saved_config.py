"""The config of a checkpoint that is quantized already, and one that is given when it is loaded.

transformers itself would use the saved one with no more than a warning.
"""

import copy
from collections.abc import Mapping
from typing import Any

from quanto_hf.hf.config.base import SKELETON_METHOD, FormatConfig
from quanto_hf.hf.config.foreign_words import SHORT
from quanto_hf.io.decoders import decodable, decoder_of
from quanto_hf.io.formats import FORMATS

# what a config may ask of a checkpoint that was saved without it
ASKED = ("learn_scales", "static_activations")


def merge_saved(saved: Any, given: FormatConfig) -> FormatConfig:
    """The saved config, in the class of the given one, with what that may decide.

    Args:
        saved: a dict, or a config of any class.
        given: asks for the same, or less; or for anything, of a checkpoint of another method that can be decoded.

    Raises:
        ValueError: the checkpoint has another method that cannot be decoded, or the given config contradicts the saved
            one.
    """
    values = saved if isinstance(saved, dict) else saved.to_dict()
    method, cls = method_of(values), type(given)
    if method != cls.format.method:
        if (decoder := decoder_of(values)) is not None:
            decoded = copy.deepcopy(given)
            decoded.decoder = decoder
            return decoded
        raise quantized_already(method, f"{'an' if cls.__name__[0] in 'AEIOU' else 'a'} {cls.__name__}")
    merged: FormatConfig = cls.from_dict(values)
    # QuantoConfig(dequantize=True) alone asks for no scheme
    if not (given.dequantize and not cls.from_dict({"dequantize": True}).conflicts(given)):
        _refuse(merged, given, merged.conflicts(given))
    if given.qat and not merged.qat:
        raise ValueError(
            "qat=True trains float weights, and the checkpoint has packed ones, which are frozen. Load the original "
            "float checkpoint with this config; or load this one with QuantoConfig(dequantize=True), and let "
            "quanto_hf.quantize(model, ...) round its weights anew"
        )
    merged.dequantize = given.dequantize
    # what the checkpoint has no tensors for, and can begin now
    merged.asked = tuple(flag for flag in ASKED if getattr(given, flag) and not getattr(merged, flag))
    if given.quant_method == SKELETON_METHOD:
        merged.quant_method = SKELETON_METHOD
    return merged


def check_method(config: Any) -> None:
    """Refuse the quantization config of a checkpoint that is in a known format by its other keys, and names another
    method; or none: transformers ignores a method that it does not know, and loads packed weights as random floats.

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
    found = next((known.method for known in FORMATS.values() if known.keys and known.keys <= keys), None)
    allowed = () if found is None else (found, SKELETON_METHOD)
    # the methods of transformers are an enum of strings
    named = isinstance(method, str)
    if (allowed and method not in allowed) or not (named or method is None):
        text = f"; by its other keys it is {allowed[0]!r}" if allowed else ", and has to be a string"
        raise ValueError(f"quant_method={method!r} in the quantization_config of config.json is not known{text}")


def method_of(values: Mapping[str, Any]) -> Any:
    """The method of the config of a checkpoint, or None; bitsandbytes does not always name itself."""
    method = values.get("quant_method")
    if method is None and (values.get("load_in_4bit") or values.get("load_in_8bit")):
        return "bitsandbytes"
    return method


def quantized_already(method: Any, given: str) -> ValueError:
    """The error for a checkpoint of another method.

    Args:
        method: a name, or a member of transformers' enum.
        given: what kind of config was given for it.
    """
    return ValueError(
        # the methods of transformers are an enum
        f"the checkpoint is quantized already, with {getattr(method, 'value', method)}; "
        f"load it without {given}, or quantize the original float checkpoint (those in {decodable()} are decoded while "
        f"they are loaded)"
    )


def _refuse(saved: Any, given: Any, different: list[str]) -> None:
    if different:
        pairs = ", ".join(
            f"{n}={SHORT.repr(getattr(saved, n))} (you gave {SHORT.repr(getattr(given, n))})" for n in different
        )
        raise ValueError(
            f"the checkpoint is quantized already, with {pairs}. Load it without a quantization_config, or quantize "
            f"the original float checkpoint"
        )
