"""The empty quantized model that ``from_pretrained`` builds, without the weights."""

import copy
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from transformers.quantizers import auto

from quanto_hf.hf.config import QuantoConfig
from quanto_hf.hf.load import load_and_quantize_model
from quanto_hf.hf.quantizer import QuantoHfQuantizer

# known to transformers only so that from_pretrained finds the class below; it is never saved
METHOD = "quanto_hf_skeleton"


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


def build_skeleton(path: str, config: QuantoConfig, dtype: Any = "auto", auto_class: Any = None) -> Skeleton:
    """The empty quantized model of a float checkpoint: from ``from_pretrained`` itself, so that every decision (class,
    dtype, names, modules that stay float) is the one that loading makes.

    Args:
        path: a local folder with a float checkpoint.
        config: how it is quantized.
        dtype: as of ``from_pretrained``.
        auto_class: the class whose ``from_pretrained`` is called; None is the class that the checkpoint names.

    Raises:
        ValueError: the checkpoint or the config cannot be used.
    """
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = SkeletonQuantizer
    marked = copy.deepcopy(config)
    marked.quant_method = METHOD
    try:
        load_and_quantize_model(path, marked, auto_class, dtype=dtype)
    except _Built as built:
        return built.skeleton
    raise ValueError(f"{path} cannot be quantized: transformers loaded it without asking the quantizer")
