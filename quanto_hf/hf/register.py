"""Making the method known to transformers, without importing more of it than ``import transformers`` does."""

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from quanto_hf.hf.aqlm_config import AQLM_METHOD, AqlmConfig
from quanto_hf.hf.config import METHOD, QuantoConfig
from quanto_hf.hf.saved_config import merge_saved, merge_saved_aqlm
from quanto_hf.hf.saved_method import check_method

# Importing it takes 0.9 s, so it is patched when somebody else imports it, which from_pretrained does.
AUTO = "transformers.quantizers.auto"

OVERRIDES = ("quanto", AQLM_METHOD)

_overrides: set[str] = set()


def register() -> None:
    """Register the method ``quanto_hf`` with transformers, now or when its quantizers are imported."""
    if AUTO in sys.modules:
        _register(sys.modules[AUTO])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


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


class _AfterImport(importlib.abc.MetaPathFinder):
    """Registers the method right after :data:`AUTO` has been imported."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register(auto: Any) -> None:
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
    supports = auto.AutoHfQuantizer.supports_quant_method

    def supports_quant_method(quantization_config_dict: Any) -> bool:
        check_method(quantization_config_dict)
        return bool(supports(quantization_config_dict))

    auto.AutoHfQuantizer.supports_quant_method = staticmethod(supports_quant_method)
    from_config = auto.AutoHfQuantizer.from_config

    def quantizer_from_config(quantization_config: Any, **kwargs: Any) -> Any:
        # who gives our class means us, also where transformers serves the method
        theirs = auto.AUTO_QUANTIZER_MAPPING[AQLM_METHOD].__module__.startswith("transformers.")
        asked = isinstance(quantization_config, AqlmConfig) and quantization_config.quant_method == AQLM_METHOD
        if asked and theirs:
            return importlib.import_module("quanto_hf.hf.aqlm").AqlmQuantizer(quantization_config, **kwargs)
        return from_config(quantization_config, **kwargs)

    auto.AutoHfQuantizer.from_config = staticmethod(quantizer_from_config)
