"""The config of a checkpoint that is quantized already, and one that is given when it is loaded.

transformers itself would use the saved one with no more than a warning.
"""

from collections.abc import Mapping
from typing import Any

from quanto_hf.hf.config.aqlm import AQLM_METHOD, AqlmConfig
from quanto_hf.hf.config.foreign_words import SHORT
from quanto_hf.hf.config.quanto import SKELETON_METHOD, QuantoConfig

# what a config may ask of a checkpoint that was saved without it
ASKED = ("learn_scales", "static_activations")


def merge_saved(saved: Any, given: QuantoConfig) -> QuantoConfig:
    """The saved config, with what the given one may decide.

    Raises:
        ValueError: the checkpoint has another method, or the given config contradicts the saved one.
    """
    if not isinstance(saved, QuantoConfig):
        raise quantized_already(getattr(saved, "quant_method", saved), "a QuantoConfig")
    # QuantoConfig(dequantize=True) alone asks for no scheme
    if not (given.dequantize and not QuantoConfig(dequantize=True).conflicts(given)):
        _refuse(saved, given, saved.conflicts(given))
    if given.qat and not saved.qat:
        raise ValueError(
            "qat=True trains float weights, and the checkpoint has packed ones, which are frozen. Load the original "
            "float checkpoint with this config; or load this one with QuantoConfig(dequantize=True), and let "
            "quanto_hf.quantize(model, ...) round its weights anew"
        )
    merged: Any = saved
    merged.dequantize = given.dequantize
    # what the checkpoint has no tensors for, and can begin now; the class has the default, and it is not saved
    merged.asked = tuple(flag for flag in ASKED if getattr(given, flag) and not getattr(saved, flag))
    if given.quant_method == SKELETON_METHOD:
        merged.quant_method = SKELETON_METHOD
    return saved


def merge_saved_aqlm(saved: Any, given: AqlmConfig) -> AqlmConfig:
    """The saved config in our class, whoever serves the method "aqlm".

    Args:
        saved: a dict, or a config of any class.
        given: with the sizes of the saved one, and its list of names or none.

    Raises:
        ValueError: the checkpoint has another method, or the given config contradicts the saved one.
    """
    values = saved if isinstance(saved, dict) else saved.to_dict()
    method = method_of(values)
    if method != AQLM_METHOD:
        raise quantized_already(method, "an AqlmConfig")
    config: AqlmConfig = AqlmConfig.from_dict(values)
    _refuse(config, given, config.conflicts(given))
    if given.quant_method == SKELETON_METHOD:
        config.quant_method = SKELETON_METHOD
    return config


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
        f"load it without {given}, or quantize the original float checkpoint"
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
