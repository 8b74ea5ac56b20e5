"""The empty quantized model that ``from_pretrained`` builds, without the weights."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from transformers import AutoConfig
from transformers.quantizers import auto

from quanto_hf.hf.aqlm import AqlmQuantizer
from quanto_hf.hf.aqlm_config import AQLM_METHOD, AqlmConfig
from quanto_hf.hf.config import METHOD as SAVED_METHOD
from quanto_hf.hf.config import SKELETON_METHOD as METHOD
from quanto_hf.hf.config import QuantoConfig
from quanto_hf.hf.load import load_and_quantize_model, named_class
from quanto_hf.hf.quantizer import QuantoHfQuantizer


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


class SkeletonQuantizer(QuantoHfQuantizer):
    """Stops ``from_pretrained`` at the last hook before weights are read."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._files = [str(file) for file in kwargs.get("checkpoint_files") or []]
        return super()._process_model_before_weight_loading(model, **kwargs)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> NoReturn:
        """Raises the skeleton, after the checks of the quantizer."""
        conversions = super().update_weight_conversions(weight_conversions, model)
        raise _Built(Skeleton(model, self, conversions, self._files, self._dtype))


class AqlmSkeletonQuantizer(SkeletonQuantizer, AqlmQuantizer):
    """The same for models in the AQLM format."""


def build_skeleton(path: str, config: QuantoConfig | None, dtype: Any = "auto", auto_class: Any = None) -> Skeleton:
    """The empty quantized model of a checkpoint: from ``from_pretrained`` itself, so that every decision (class,
    dtype, names, modules that stay float) is the one that loading makes.

    Args:
        path: a local folder with a checkpoint.
        config: how it is quantized; None is the saved config of a quantized checkpoint, and else the default.
        dtype: as of ``from_pretrained``.
        auto_class: the class whose ``from_pretrained`` is called; None is the class that the checkpoint names.

    Raises:
        ValueError: the checkpoint or the config cannot be used.
    """
    saved = saved_config(AutoConfig.from_pretrained(path)) if config is None else None
    marked = None if isinstance(saved, AqlmConfig) else _marked(config or saved)
    return _catch(path, marked, lambda: load_and_quantize_model(path, marked, auto_class, dtype=dtype))


def skeleton_of_config(
    model_config: Any, config: QuantoConfig | None, dtype: Any = "auto", auto_class: Any = None
) -> Skeleton:
    """The same from the config of a model alone: there need not be a checkpoint.

    Args:
        model_config: a ``PreTrainedConfig``, as of ``AutoConfig.from_pretrained``.
    """
    saved = saved_config(model_config) if config is None else None
    marked = None if isinstance(saved, AqlmConfig) else _marked(config or saved)
    cls = named_class(model_config) if auto_class is None else auto_class
    arguments = {"config": model_config, "state_dict": {}, "dtype": dtype}
    if marked is not None:
        arguments["quantization_config"] = marked
    return _catch(type(model_config).__name__, marked, lambda: cls.from_pretrained(None, **arguments))


def saved_config(model_config: Any) -> Any:
    """The config with which a checkpoint says that it was quantized by quanto_hf, or is in the AQLM format; None if it
    says no such thing."""
    saved = getattr(model_config, "quantization_config", None)
    if isinstance(saved, QuantoConfig | AqlmConfig):
        return copy.deepcopy(saved)
    if not isinstance(saved, dict) or saved.get("quant_method") not in (SAVED_METHOD, AQLM_METHOD):
        return None
    if saved["quant_method"] == AQLM_METHOD:
        return AqlmConfig(**saved)
    made = QuantoConfig.from_dict(saved)
    assert isinstance(made, QuantoConfig)
    return made


def _marked(config: Any) -> Any:
    marked = QuantoConfig() if config is None else copy.deepcopy(config)
    marked.quant_method = METHOD
    return marked


def _catch(what: str, marked: Any, load: Callable[[], Any]) -> Skeleton:
    """Args:
    what: names the model.
    marked: the config that ``load`` gives; None: that of an AQLM checkpoint, which no other config may replace.
    load: calls ``from_pretrained``.
    """
    aqlm = marked is None or isinstance(marked, AqlmConfig)
    method, mapping = METHOD if marked is not None else AQLM_METHOD, auto.AUTO_QUANTIZER_MAPPING
    before = mapping.get(method)
    mapping[method] = AqlmSkeletonQuantizer if aqlm else SkeletonQuantizer
    try:
        load()
    except _Built as built:
        return built.skeleton
    finally:
        if before is None:
            del mapping[method]
        else:
            mapping[method] = before
    raise ValueError(f"{what} cannot be quantized: transformers loaded it without asking the quantizer")
