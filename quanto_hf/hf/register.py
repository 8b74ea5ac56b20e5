"""Making the method known to transformers, without importing more of it than ``import transformers`` does."""

import importlib
from typing import Any

from quanto_hf.hf.aqlm_config import AQLM_METHOD, AqlmConfig
from quanto_hf.hf.config import METHOD, QuantoConfig
from quanto_hf.hf.saved_config import merge_saved, merge_saved_aqlm
from quanto_hf_autoload import autoload

OVERRIDES = ("quanto", AQLM_METHOD)

_overrides: set[str] = set()


def register() -> None:
    """Register the method ``quanto_hf`` with transformers, now or when its quantizers are imported.

    Importing them takes 0.9 s, so that it is left to whoever needs them, which from_pretrained does. The finder that
    notices is the one that torch puts there for programs that do not import quanto_hf.
    """
    autoload()


def install(override: str) -> None:
    """Let quanto_hf also serve a method that transformers has already.

    Args:
        override: "quanto": ``transformers.QuantoConfig`` then quantizes with quanto_hf. "aqlm": checkpoints in the AQLM
            format are loaded by quanto_hf. (:class:`quanto_hf.AqlmConfig` does that without it where it is given.)

    Raises:
        ValueError: the method cannot be overridden.

    Example:
        >>> install(override="quanto")
    """
    if override not in OVERRIDES:
        raise ValueError(f"override={override!r} is not possible; choose one of {', '.join(map(repr, OVERRIDES))}")
    _overrides.add(override)
    register()


def register_with(auto: Any) -> None:
    """Register with transformers' quantizers. May be called again.

    Args:
        auto: the module ``transformers.quantizers.auto``, imported.
    """
    quantizer = getattr(importlib.import_module("quanto_hf.hf.quantizer"), "QuantoHfQuantizer", None)
    if quantizer is None:
        # its module is being imported right now, which imported transformers' quantizers; it registers at its end
        return
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = QuantoConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = quantizer
    for method in _overrides:
        if method == AQLM_METHOD:
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = AqlmConfig
            auto.AUTO_QUANTIZER_MAPPING[method] = importlib.import_module("quanto_hf.hf.aqlm").AqlmQuantizer
        else:
            auto.AUTO_QUANTIZER_MAPPING[method] = quantizer
    merge = auto.AutoHfQuantizer.merge_quantization_configs
    if getattr(merge, "checks_quanto_hf", False):
        return

    def merge_quantization_configs(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        given = quantization_config_from_args
        if isinstance(given, QuantoConfig):
            return merge_saved(merge(quantization_config, None), given)
        if isinstance(given, AqlmConfig):
            return merge_saved_aqlm(quantization_config, given)
        return merge(quantization_config, given)

    merge_quantization_configs.checks_quanto_hf = True  # type: ignore[attr-defined]
    auto.AutoHfQuantizer.merge_quantization_configs = staticmethod(merge_quantization_configs)
    from_config = auto.AutoHfQuantizer.from_config

    def quantizer_from_config(quantization_config: Any, **kwargs: Any) -> Any:
        # who gives our class means us, also where transformers serves the method
        theirs = auto.AUTO_QUANTIZER_MAPPING[AQLM_METHOD].__module__.startswith("transformers.")
        asked = isinstance(quantization_config, AqlmConfig) and quantization_config.quant_method == AQLM_METHOD
        if asked and theirs:
            return importlib.import_module("quanto_hf.hf.aqlm").AqlmQuantizer(quantization_config, **kwargs)
        return from_config(quantization_config, **kwargs)

    auto.AutoHfQuantizer.from_config = staticmethod(quantizer_from_config)
