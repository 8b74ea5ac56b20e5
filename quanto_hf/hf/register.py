"""Making the method known to transformers, without importing more of it than ``import transformers`` does."""

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from quanto_hf.hf.aqlm_config import AQLM_METHOD, AqlmConfig
from quanto_hf.hf.config import METHOD, SKELETON_METHOD, QuantoConfig

# Importing it takes 0.9 s, so it is patched when somebody else imports it, which from_pretrained does.
AUTO = "transformers.quantizers.auto"

# what a config may ask of a checkpoint that was saved without it
ASKED = ("learn_scales", "static_activations")

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
            format are loaded by quanto_hf, and :class:`quanto_hf.AqlmConfig` makes them.

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
        if not isinstance(quantization_config_from_args, QuantoConfig):
            return merge(quantization_config, quantization_config_from_args)
        return _merge(merge(quantization_config, None), quantization_config_from_args)

    merge_quantization_configs.checks_quanto_hf = True  # type: ignore[attr-defined]
    auto.AutoHfQuantizer.merge_quantization_configs = staticmethod(merge_quantization_configs)


def _merge(saved: Any, given: QuantoConfig) -> QuantoConfig:
    """The config of a quantized checkpoint, if a given one does not contradict it. transformers itself would use the
    saved one with no more than a warning."""
    if not isinstance(saved, QuantoConfig):
        method = getattr(saved, "quant_method", saved)
        raise ValueError(
            # the methods of transformers are an enum
            f"the checkpoint is quantized already, with {getattr(method, 'value', method)}; "
            f"load it without a QuantoConfig, or quantize the original float checkpoint"
        )
    different = saved.conflicts(given)
    # QuantoConfig(dequantize=True) alone asks for no scheme
    if different and not (given.dequantize and not QuantoConfig(dequantize=True).conflicts(given)):
        pairs = ", ".join(f"{n}={getattr(saved, n)!r} (you gave {getattr(given, n)!r})" for n in different)
        raise ValueError(
            f"the checkpoint is quantized already, with {pairs}. Load it without a quantization_config, or quantize "
            f"the original float checkpoint"
        )
    if given.qat and not saved.qat:
        raise ValueError(
            "qat=True trains float weights, and the checkpoint has packed ones, which are frozen. Load the original "
            "float checkpoint with this config; or load this one with QuantoConfig(dequantize=True), and let "
            "quanto_hf.quantize(model, ...) round its weights anew"
        )
    saved.dequantize = given.dequantize
    # what the checkpoint has no tensors for, and can begin now
    asked = tuple(flag for flag in ASKED if getattr(given, flag) and not getattr(saved, flag))
    saved.asked = asked  # type: ignore[misc]
    if given.quant_method == SKELETON_METHOD:
        saved.quant_method = SKELETON_METHOD
    return saved
