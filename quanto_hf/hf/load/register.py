"""Making the method known to transformers, without importing more of it than ``import transformers`` does."""

import importlib
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import quanto_hf.hf.config.aqlm  # noqa: F401  # its config joins the table
from quanto_hf.hf.config.base import CONFIGS, FormatConfig, add_config, quantizer_class
from quanto_hf.hf.config.quanto import METHOD
from quanto_hf.hf.config.refusals import refuse_no_config, refuse_without_optimum_quanto
from quanto_hf.hf.config.saved_config import check_method, merge_saved
from quanto_hf_autoload import autoload

OVERRIDES = ("quanto", "aqlm")

_lock = threading.RLock()
_overrides: set[str] = set()


def register() -> None:
    """Register the method ``quanto_hf`` with transformers, now or when its quantizers are imported.

    Importing them takes 0.9 s, so that it is left to whoever needs them, which from_pretrained does. The finder that
    notices is the one that torch puts there for programs that do not import quanto_hf.
    """
    autoload()


def register_format(cls: type[FormatConfig]) -> type[FormatConfig]:
    """Let models in one more format be loaded, saved, planned and inspected; a decorator of the class of its config.

    Args:
        cls: with a ``format``, whose method transformers does not serve itself.
    """
    add_config(cls)
    register()
    return cls


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
    made: dict[str, Any] = {}
    for method, cls in CONFIGS.items():
        # one that transformers serves is left to it, unless it is asked for
        if method in _overrides or not _is_of_transformers(auto, method):
            # the others import the module of the first one, which is our own
            late = METHOD in made and not isinstance(made[METHOD], type)
            made[method] = _late(cls.quantizer) if late else _quantizer(cls.quantizer)
    with _lock:
        for method, quantizer in made.items():
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = CONFIGS[method]
            auto.AUTO_QUANTIZER_MAPPING[method] = quantizer
        if "quanto" in _overrides:
            auto.AUTO_QUANTIZER_MAPPING["quanto"] = made[METHOD]
        _patch(auto)


def _quantizer(path: str) -> Any:
    """A quantizer class, or what makes one later: while its module is being imported, which has imported transformers'
    quantizers, and the module registers the class at its end; and where there are several threads. To import it here,
    in the middle of other imports, would then mean to wait for a thread that waits for those."""
    module, _, name = path.rpartition(".")
    found = sys.modules.get(module)
    if found is None and threading.active_count() == 1:
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            # not an error: it would be one of whatever imports transformers' models
            warnings.warn(f"quanto_hf cannot quantize with this transformers: {error}", stacklevel=2)
    return getattr(found, name, None) or _late(path)


def _late(path: str) -> Callable[..., Any]:
    """What imports the module of a quantizer class when the first one is made."""
    module, _, name = path.rpartition(".")

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
        if isinstance(given, FormatConfig):
            return merge_saved(quantization_config, given)
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
        if isinstance(quantization_config, FormatConfig) and method == quantization_config.format.method:
            return quantizer_class(quantization_config)(quantization_config, **kwargs)
        return from_config(quantization_config, **kwargs)

    merge_quantization_configs.checks_quanto_hf = True  # type: ignore[attr-defined]
    auto.AutoHfQuantizer.merge_quantization_configs = staticmethod(merge_quantization_configs)
    auto.AutoHfQuantizer.supports_quant_method = staticmethod(supports_quant_method)
    auto.AutoHfQuantizer.from_config = staticmethod(quantizer_from_config)


def _is_of_transformers(auto: Any, method: str) -> bool:
    """Whether transformers' own quantizer serves a method."""
    return getattr(auto.AUTO_QUANTIZER_MAPPING.get(method), "__module__", "").startswith("transformers.")
