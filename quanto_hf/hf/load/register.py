"""Making the method known to transformers, without importing more of it than ``import transformers`` does."""

import importlib
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

from quanto_hf.hf.config.aqlm import AQLM_METHOD, AqlmConfig
from quanto_hf.hf.config.quanto import METHOD, QuantoConfig
from quanto_hf.hf.config.refusals import refuse_no_config, refuse_other_method, refuse_without_optimum_quanto
from quanto_hf.hf.config.saved_config import merge_saved, merge_saved_aqlm
from quanto_hf.hf.config.saved_method import check_method
from quanto_hf_autoload import autoload

OVERRIDES = ("quanto", AQLM_METHOD)

_lock = threading.RLock()
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
    with _lock:
        _overrides.add(override)
    register()


def register_with(auto: Any) -> None:
    """Register with transformers' quantizers. May be called again.

    Args:
        auto: the module ``transformers.quantizers.auto``, imported.
    """
    # not under the lock: these may be imported
    quantizer = _quantizer("quanto_hf.hf.load.quantizer", "QuantoHfQuantizer")
    aqlm = None
    if AQLM_METHOD in _overrides or AQLM_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        # the latter in a transformers that does not have it any more; its module imports that of the quantizer
        module, name = "quanto_hf.hf.load.aqlm", "AqlmQuantizer"
        aqlm = _quantizer(module, name) if isinstance(quantizer, type) else _late(module, name)
    with _lock:
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = QuantoConfig
        auto.AUTO_QUANTIZER_MAPPING[METHOD] = quantizer
        if "quanto" in _overrides:
            auto.AUTO_QUANTIZER_MAPPING["quanto"] = quantizer
        if aqlm is not None:
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING[AQLM_METHOD] = AqlmConfig
            auto.AUTO_QUANTIZER_MAPPING[AQLM_METHOD] = aqlm
        _patch(auto)


def _quantizer(module: str, name: str) -> Any:
    """A quantizer class, or what makes one later: while its module is being imported, which has imported transformers'
    quantizers, and the module registers the class at its end; and where there are several threads. To import it here,
    in the middle of other imports, would then mean to wait for a thread that waits for those."""
    found = sys.modules.get(module)
    if found is None and threading.active_count() == 1:
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            # not an error: it would be one of whatever imports transformers' models
            warnings.warn(f"quanto_hf cannot quantize with this transformers: {error}", stacklevel=2)
    return getattr(found, name, None) or _late(module, name)


def _late(module: str, name: str) -> Callable[..., Any]:
    """What imports the module of a quantizer class when the first one is made."""

    def make(config: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(config, **kwargs)

    return make


def _patch(auto: Any) -> None:
    """Let the configs of quanto_hf be read by us, whatever a checkpoint says of its own."""
    merge, from_config = auto.AutoHfQuantizer.merge_quantization_configs, auto.AutoHfQuantizer.from_config
    if getattr(merge, "checks_quanto_hf", False):
        return

    def merge_quantization_configs(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        given = quantization_config_from_args
        refuse_no_config(given)
        if isinstance(given, QuantoConfig):
            refuse_other_method(quantization_config)
            return merge_saved(merge(quantization_config, None), given)
        if isinstance(given, AqlmConfig):
            return merge_saved_aqlm(quantization_config, given)
        return merge(quantization_config, given)

    supports = auto.AutoHfQuantizer.supports_quant_method

    def supports_quant_method(quantization_config_dict: Any) -> bool:
        check_method(quantization_config_dict)
        return bool(supports(quantization_config_dict))

    def quantizer_from_config(quantization_config: Any, **kwargs: Any) -> Any:
        refuse_no_config(quantization_config)
        method = getattr(quantization_config, "quant_method", None)
        if method == "quanto" and _is_of_transformers(auto, "quanto"):
            refuse_without_optimum_quanto()
        # who gives our class means us, also where transformers serves the method
        if isinstance(quantization_config, AqlmConfig) and method == AQLM_METHOD:
            return importlib.import_module("quanto_hf.hf.load.aqlm").AqlmQuantizer(quantization_config, **kwargs)
        return from_config(quantization_config, **kwargs)

    merge_quantization_configs.checks_quanto_hf = True  # type: ignore[attr-defined]
    auto.AutoHfQuantizer.merge_quantization_configs = staticmethod(merge_quantization_configs)
    auto.AutoHfQuantizer.supports_quant_method = staticmethod(supports_quant_method)
    auto.AutoHfQuantizer.from_config = staticmethod(quantizer_from_config)


def _is_of_transformers(auto: Any, method: str) -> bool:
    """Whether transformers' own quantizer serves a method."""
    return getattr(auto.AUTO_QUANTIZER_MAPPING.get(method), "__module__", "").startswith("transformers.")
