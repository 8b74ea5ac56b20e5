"""Registers quanto_hf with transformers in programs that do not import it: pipelines, servers, workers.

transformers does not look for quantizers, but torch looks for backends: it calls :func:`autoload` at ``import torch``
(the entry point group ``torch.backends``, which TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns off). This module stands outside
of the package, because importing any part of a package imports the package: nothing is imported here until somebody
imports transformers' quantizers. Whatever goes wrong, torch and transformers go on, and only a model that needs
quanto_hf is refused.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO = "transformers.quantizers.auto"
METHOD = "quanto_hf"


def autoload() -> None:
    """Have quanto_hf register when :data:`AUTO` is imported, or now if it is. May be called any number of times, in any
    thread; never raises.

    Example:
        >>> autoload()
        >>> sys.meta_path.count(FINDER)
        1
    """
    try:
        if FINDER not in sys.meta_path:
            # never taken out again: a removal makes imports in other threads skip the next finder
            sys.meta_path.insert(0, FINDER)
        if (auto := sys.modules.get(AUTO)) is not None:
            _register_when_ready(auto)
    except Exception:
        # an error here would be one of `import torch`
        return


class _Finder:
    """Finds :data:`AUTO` where the other finders do."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != AUTO:
            return None
        for finder in list(sys.meta_path):
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(name, path, target) if find is not None else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


FINDER: Any = _Finder()


class _Loader:
    """The loader of :data:`AUTO`, and afterwards the registration."""

    def __init__(self, loader: Any) -> None:
        self.__dict__["loader"] = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["loader"], name)

    def exec_module(self, module: ModuleType) -> None:
        loader = self.__dict__["loader"]
        module.__loader__ = loader
        if module.__spec__ is not None:
            module.__spec__.loader = loader
        loader.exec_module(module)
        _register(module)


class _WatchedSpec(ModuleSpec):
    """The spec of a module whose import was under way before the finder was there: that import imports torch. Python
    says in the spec when it is done."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value and isinstance(module := sys.modules.get(self.name), ModuleType):
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            _register(module)


def _register_when_ready(auto: ModuleType) -> None:
    spec = auto.__spec__
    if spec is not None and getattr(spec, "_initializing", False):
        spec.__class__ = _WatchedSpec
    # asked again: another thread may have been about to finish
    if not getattr(spec, "_initializing", False):
        _register(auto)


def _call(auto: Any) -> None:
    # the package first: to import a part of it makes a thread that imports the package at this time fail in a deadlock
    import_module("quanto_hf")
    import_module("quanto_hf.hf.load.register").register_with(auto)


def _register(auto: Any) -> None:
    try:
        _call(auto)
    except Exception as error:
        # transformers goes on
        _refuse(auto, error)


def _refuse(auto: Any, error: Exception) -> None:
    """Make transformers raise for what needs quanto_hf, which cannot be imported."""
    if hasattr(auto.AutoHfQuantizer, "refuses_quanto_hf"):
        return
    supports, from_config = auto.AutoHfQuantizer.supports_quant_method, auto.AutoHfQuantizer.from_config

    def check(config: Any) -> None:
        method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
        if method != METHOD or METHOD in auto.AUTO_QUANTIZER_MAPPING:
            return
        try:
            # it may have been in the middle of its own import
            _call(auto)
        except Exception as now:
            raise ImportError(f"the model is quantized with quanto_hf, which cannot be imported: {now}") from now
        if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
            raise ImportError(f"the model is quantized with quanto_hf, which could not register: {error}") from error

    def supports_quant_method(quantization_config_dict: Any) -> Any:
        check(quantization_config_dict)
        return supports(quantization_config_dict)

    def checked_from_config(quantization_config: Any, **kwargs: Any) -> Any:
        check(quantization_config)
        return from_config(quantization_config, **kwargs)

    auto.AutoHfQuantizer.refuses_quanto_hf = True
    auto.AutoHfQuantizer.supports_quant_method = staticmethod(supports_quant_method)
    auto.AutoHfQuantizer.from_config = staticmethod(checked_from_config)
