"""The empty quantized model of whatever holds one: a folder, a hub id, or a model in memory."""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig

from quanto_hf.flow import assign
from quanto_hf.hf.config.base import FormatConfig, quantizer_class
from quanto_hf.hf.config.quanto import QuantoConfig
from quanto_hf.hf.config.refusals import refuse_no_config, refuse_optimum_quanto
from quanto_hf.hf.convert.sources import has_weights, headers_only
from quanto_hf.hf.load.assigning import was_written_from
from quanto_hf.hf.load.checking import check_before_loading
from quanto_hf.hf.load.replace import replace_by_assignment
from quanto_hf.hf.memory.skeleton import Skeleton, build_skeleton, saved_config, skeleton_of_config
from quanto_hf.io import CheckpointError
from quanto_hf.nn import QuantizedWeight
from quanto_hf.schemes import TensorSpec


@dataclass(frozen=True)
class Empty:
    """A model without weights, and where it comes from.

    Args:
        skeleton: the model and its quantizer.
        quantized: whether it comes from quantized weights; else it is quantized while it is loaded.
        config: of the quantization.
        source: of a float model, what :func:`empty_model` can be asked for again with another config; None if there
            is none.
        borrowed: whether the model is the user's own, and not to be changed.
        notes: sentences about what had to be assumed.
    """

    skeleton: Skeleton
    quantized: bool
    config: FormatConfig
    source: Any
    borrowed: bool = False
    notes: tuple[str, ...] = ()


def empty_model(
    what: Any,
    config: FormatConfig | None,
    dtype: Any = "auto",
    auto_class: Any = None,
    hub: Mapping[str, Any] = MappingProxyType({}),
) -> Empty:
    """Build it. No weight is read.

    Args:
        what: a folder, a hub id, a transformers config, or a model, loaded or not, whose weights stay as they are.
        config: how it is quantized; None is the saved config of a quantized model, and else ``QuantoConfig()``.
        dtype: as of ``from_pretrained``; a model in memory keeps its own.
        auto_class: as of :func:`quanto_hf.load_and_quantize_model`.
        hub: where a checkpoint is, as of ``from_pretrained`` (:data:`quanto_hf.hf.load.load_and_quantize.HUB_KEYS`).

    Raises:
        ValueError: it is no model, or the config cannot be used with it.
        TypeError: the config is not one.
    """
    refuse_no_config(config, "config")
    if isinstance(what, nn.Module):
        return _of_model(what, config)
    if not isinstance(what, str | os.PathLike):
        if not hasattr(what, "model_type"):
            raise ValueError(f"{type(what).__name__} is not a model: give a folder, a hub id, a config or a model")
        return _of_config(what, config, dtype, auto_class, None, hub)
    folder, headers = headers_only(what, hub)
    if folder is None:
        return _of_config(_read_config(what, f"{what}", hub, auto_class), config, dtype, auto_class, headers, hub)
    # what is here is taken from here; of the other keys these count here too
    hub = {key: hub[key] for key in ("subfolder", "trust_remote_code") if key in hub}
    place = folder / (hub.get("subfolder") or "")
    if not (place / "config.json").is_file():
        raise CheckpointError(f"{place} is not a model: it has no config.json")
    saved = _read_config(folder, f"{place / 'config.json'}", hub, auto_class)
    if not has_weights(place):
        return _of_config(saved, config, dtype, auto_class, None, hub)
    try:
        return _made(build_skeleton(str(folder), config, dtype, auto_class, hub), saved)
    except SafetensorError as error:
        raise CheckpointError(f"a weight file of {place} cannot be read: {error}") from None
    except FileNotFoundError as error:
        raise CheckpointError(f"a weight file of {place} is missing: {error}") from None


def _read_config(model: Any, name: str, hub: Mapping[str, Any], auto_class: Any) -> Any:
    # a class of a model knows its config, also one that AutoConfig does not know (a part of Bark)
    reader = getattr(auto_class, "config_class", None) or AutoConfig
    try:
        return reader.from_pretrained(model, **hub)
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{name} cannot be read: {first}") from None


def _of_config(
    saved: Any,
    config: FormatConfig | None,
    dtype: Any,
    auto_class: Any,
    headers: dict[str, TensorSpec] | None,
    hub: Mapping[str, Any],
) -> Empty:
    notes = []
    if headers is None:
        notes.append("there are no weight files: everything is taken from the config")
    if dtype == "auto" and saved.dtype is None:
        floats = [spec.dtype for spec in (headers or {}).values() if getattr(spec.dtype, "is_floating_point", False)]
        dtype = floats[0] if floats else torch.float32
        if not floats:
            notes.append("the config names no dtype: float32 is assumed")
    skeleton = skeleton_of_config(saved, config, dtype, auto_class, hub)
    if headers is not None:
        refuse_optimum_quanto(headers)
        headers = skeleton.quantizer.decoding.headers(headers)
        quantized, complete = skeleton.quantizer.pre_quantized, was_written_from(skeleton.model)
        check_before_loading(skeleton.model, headers, copy.deepcopy(skeleton.conversions), quantized, complete=complete)
    return _made(skeleton, saved, tuple(notes))


def _made(skeleton: Skeleton, saved: Any, notes: tuple[str, ...] = ()) -> Empty:
    source = copy.deepcopy(saved)
    if hasattr(source, "quantization_config"):
        del source.quantization_config
    source.dtype = skeleton.dtype
    found = skeleton.quantizer
    return Empty(skeleton, found.pre_quantized, found.quantization_config, source, notes=notes)


# ----------------------------------------------------------------------------------------------------- models in memory


def _of_model(model: nn.Module, config: FormatConfig | None) -> Empty:
    layers = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    if not all(layer.is_frozen for layer in layers):
        raise ValueError("the model has quantized layers that are not frozen: call quanto_hf.freeze(model) first")
    return _of_quantized(model, config) if layers else _of_float(model, config or QuantoConfig())


def _of_quantized(model: nn.Module, config: FormatConfig | None) -> Empty:
    held = saved_config(getattr(model, "config", None))
    if held is not None and config is not None:
        different = held.conflicts(config) if type(held) is type(config) else ["method"]
        if different:
            said = ", ".join(different)
            raise ValueError(f"the model is quantized already, with another {said}: leave out the config")
    used_config = held or config or QuantoConfig()
    quantizer = quantizer_class(used_config)(used_config, pre_quantized=False)
    quantizer.pre_quantized = True
    borrowed = hasattr(model, "_get_dtype_plan")
    # a copy of a model of transformers would copy the weights that its hooks have offloaded
    used = model if borrowed else _plain(_on_meta(model))
    skeleton = Skeleton(used, quantizer, [], [], _dtype(model))
    return Empty(skeleton, True, quantizer.quantization_config, None, borrowed)


def _of_float(model: nn.Module, config: FormatConfig) -> Empty:
    copied, quantizer = _on_meta(model), quantizer_class(config)(config, pre_quantized=False)
    dtype = quantizer.update_dtype(_dtype(model))
    if hasattr(model, "_get_dtype_plan"):
        quantizer.preprocess_model(copied, dtype=dtype, device_map=None, checkpoint_files=None)
        quantizer.update_weight_conversions([], copied)
    else:
        exclude = config.modules_to_not_convert or ()
        assignment = assign(copied, config.choice(), exclude=exclude, overrides=config.overrides)
        replace_by_assignment(_plain(copied), assignment, config, pre_quantized=False)
        quantizer.measure(copied)
    return Empty(Skeleton(copied, quantizer, [], [], dtype), False, quantizer.quantization_config, model)


def _dtype(model: nn.Module) -> torch.dtype:
    floats = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    return floats[0] if floats else torch.float32


def _on_meta(model: nn.Module) -> Any:
    """A copy of a model with empty tensors; the weights are not copied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _plain(model: Any) -> Any:
    """A plain torch model with what device maps ask of one of transformers."""
    model._no_split_modules, model.all_tied_weights_keys = None, {}
    return model
