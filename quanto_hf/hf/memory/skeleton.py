"""The empty quantized model that ``from_pretrained`` builds, without the weights."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from transformers import AutoConfig
from transformers.quantizers import auto

from quanto_hf.hf.config.base import CONFIGS, SKELETON_METHOD, FormatConfig, quantizer_class
from quanto_hf.hf.config.quanto import QuantoConfig
from quanto_hf.hf.load.load_and_quantize import class_without_files, load_and_quantize_model
from quanto_hf.hf.load.quantizer import QuantoHfQuantizer
from quanto_hf.io.formats import format_of


@dataclass(frozen=True)
class Skeleton:
    """What ``from_pretrained`` has right before it loads weights.

    Args:
        model: on meta; quantized layers have their empty stored tensors, and a placeholder for the float weight.
        quantizer: of the model.
        conversions: what transformers does with the names in the checkpoint.
        files: the weight files.
        dtype: of the float parts.
    """

    model: Any
    quantizer: QuantoHfQuantizer
    conversions: list[Any]
    files: list[str]
    dtype: torch.dtype


class _Built(Exception):
    """Carries the skeleton out of ``from_pretrained``."""

    def __init__(self, skeleton: Skeleton) -> None:
        super().__init__("the skeleton is built")
        self.skeleton = skeleton


class _Stops:
    """Stops ``from_pretrained`` at the last hook before weights are read; with the quantizer of a format."""

    def _process_model_before_weight_loading(self: Any, model: Any, **kwargs: Any) -> Any:
        self._files = [str(file) for file in kwargs.get("checkpoint_files") or []]
        return super()._process_model_before_weight_loading(model, **kwargs)  # type: ignore[misc]

    def update_weight_conversions(self: Any, weight_conversions: list[Any], model: Any) -> NoReturn:
        """Raises the skeleton, after the checks of the quantizer."""
        conversions = super().update_weight_conversions(weight_conversions, model)  # type: ignore[misc]
        raise _Built(Skeleton(model, self, conversions, self._files, self._dtype))


def build_skeleton(
    path: str,
    config: FormatConfig | None,
    dtype: Any = "auto",
    auto_class: Any = None,
    hub: Mapping[str, Any] = MappingProxyType({}),
) -> Skeleton:
    """The empty quantized model of a checkpoint: from ``from_pretrained`` itself, so that every decision (class,
    dtype, names, modules that stay float) is the one that loading makes.

    Args:
        path: a local folder with a checkpoint.
        config: how it is quantized; None is the saved config of a quantized checkpoint, and else the default.
        dtype: as of ``from_pretrained``.
        auto_class: the class whose ``from_pretrained`` is called; None is the class that the checkpoint names.
        hub: further arguments of ``from_pretrained`` that say where it is
            (:data:`quanto_hf.hf.load.load_and_quantize.HUB_KEYS`).

    Raises:
        ValueError: the checkpoint or the config cannot be used.
    """
    saved = saved_config(AutoConfig.from_pretrained(path, **hub)) if config is None else None
    marked = _marked(config or saved)
    return _catch(path, lambda: load_and_quantize_model(path, marked, auto_class, dtype=dtype, **hub))


def skeleton_of_config(
    model_config: Any,
    config: FormatConfig | None,
    dtype: Any = "auto",
    auto_class: Any = None,
    hub: Mapping[str, Any] = MappingProxyType({}),
) -> Skeleton:
    """The same from the config of a model alone: there need not be a checkpoint.

    Args:
        model_config: a ``PreTrainedConfig``, as of ``AutoConfig.from_pretrained``.
    """
    saved = saved_config(model_config) if config is None else None
    cls, marked = class_without_files(model_config, auto_class, hub), _marked(config or saved)
    arguments = {"config": model_config, "state_dict": {}, "dtype": dtype, "quantization_config": marked}
    return _catch(type(model_config).__name__, lambda: cls.from_pretrained(None, **arguments))


def saved_config(model_config: Any) -> Any:
    """The config with which a checkpoint says that it was quantized, in a format that is known here; None if it says no
    such thing."""
    saved = getattr(model_config, "quantization_config", None)
    if isinstance(saved, FormatConfig):
        return copy.deepcopy(saved)
    if not isinstance(saved, dict) or (known := format_of(saved)) is None:
        return None
    return CONFIGS[known.method].from_dict(saved)


def _marked(config: Any) -> Any:
    """A copy of a config for which transformers makes the quantizer that stops the loader."""
    marked = QuantoConfig() if config is None else copy.deepcopy(config)
    marked.quant_method = SKELETON_METHOD
    return marked


def _catch(what: str, load: Callable[[], Any]) -> Skeleton:
    """Args:
    what: names the model.
    load: calls ``from_pretrained`` with a marked config.
    """
    try:
        load()
    except _Built as built:
        return built.skeleton
    raise ValueError(f"{what} cannot be quantized: transformers loaded it without asking the quantizer")


@cache
def _stopping(cls: Any) -> Any:
    return type(f"Skeleton{cls.__name__}", (_Stops, cls), {})


def _quantizer(config: FormatConfig, **kwargs: Any) -> Any:
    return _stopping(quantizer_class(config))(config, **kwargs)


# Once and for all: what is put there and taken away again would serve the loads of other threads meanwhile.
auto.AUTO_QUANTIZER_MAPPING[SKELETON_METHOD] = _quantizer
