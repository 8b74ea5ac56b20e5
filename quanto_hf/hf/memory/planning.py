"""What a model will take, before anything of it is loaded: bytes per device, whether it fits, and what would."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.integrations import accelerate as maps

from quanto_hf.flow import report
from quanto_hf.hf.config.base import FormatConfig
from quanto_hf.hf.config.quanto import METHOD, QuantoConfig
from quanto_hf.hf.memory.empty import Empty, empty_model
from quanto_hf.hf.memory.kv_cache import kv_cache
from quanto_hf.hf.memory.memory_plan import DevicePlan, MemoryPlan
from quanto_hf.hf.memory.places import (
    Device,
    as_device,
    cache_by_device,
    only_device,
    order,
    place,
    quiet_maps,
    read_max_memory,
)
from quanto_hf.hf.memory.sizes import as_loaded, transient_on
from quanto_hf.qtypes import QTYPES


def plan(
    model: Any,
    config: FormatConfig | None = None,
    max_memory: int | str | Mapping[Device, int | str] | None = None,
    *,
    device_map: Any = "auto",
    context: int = 4096,
    batch: int = 1,
    dtype: Any = "auto",
    auto_class: Any = None,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    subfolder: str = "",
) -> MemoryPlan:
    """What a model will take once it is loaded, from its config and the headers of its files. No weight is read, and
    nothing is written.

    Args:
        model: a folder (a config.json is enough), a hub id, a transformers config, or a model in memory, float or
            quantized, whose present place does not count.
        config: how it is quantized on loading; None is the saved config of a quantized model, and else
            ``QuantoConfig()``.
        max_memory: bytes or a size such as "6GiB" of one device: the one that ``device_map`` names, else
            accelerator 0; or as ``from_pretrained`` takes it. None is what this machine has.
        device_map: as of ``from_pretrained``.
        context: tokens per sequence in the KV cache; 0 leaves it out.
        batch: sequences.
        dtype: as of ``from_pretrained``.
        auto_class: as of :func:`quanto_hf.load_and_quantize_model`.
        cache_dir: as of ``from_pretrained``, like all that follow: where the hub is cached.
        revision: of a hub id.
        token: for the hub.
        local_files_only: look into the cache only.
        trust_remote_code: whether code of the checkpoint may be run.
        subfolder: of the folder or hub id, in which the model is.

    Raises:
        ValueError: it is no model, a value is not allowed, or a file is damaged.

    Example:
        >>> import quanto_hf
        >>> plan(quanto_hf.tiny_lm(), QuantoConfig(weights="int4"), "16MiB").fits
        True
    """
    for name, value in (("context", context), ("batch", batch)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name}={value!r} is not a number of {name}s; give 0 or more")
    limits = read_max_memory(max_memory, only_device(device_map))
    places = {"cache_dir": cache_dir, "revision": revision, "subfolder": subfolder}
    flags = {"local_files_only": local_files_only, "trust_remote_code": trust_remote_code}
    hub: dict[str, Any] = {key: value for key, value in {**places, **flags}.items() if value}
    if token is not None:
        hub["token"] = token
    empty = empty_model(model, config, dtype, auto_class, hub)
    found = _plan(empty, limits, device_map, context, batch)
    if found.fits or empty.source is None:
        return found
    others, notes = {}, list(found.notes)
    # integers, which every kernel takes, the most exact first
    integers = sorted((kind for kind in QTYPES.values() if kind.kind == "int"), key=lambda kind: -kind.bits)
    for weights in (kind.name for kind in integers):
        if weights == empty.config.weights:
            continue
        try:
            wanted = with_weights(empty.config, weights, empty.skeleton.model)
            other = empty_model(empty.source, wanted, "auto", type(empty.skeleton.model))
        except ValueError as error:
            notes.append(f"{weights} was not tried: {error}")
            continue
        planned = _plan(other, limits, device_map, context, batch)
        others[weights] = planned.nbytes, planned.fits
    return MemoryPlan(**{**vars(found), "others": others, "notes": tuple(notes)})


def with_weights(config: Any, weights: str, model: nn.Module) -> QuantoConfig:
    """The same config with another number type, which starts from its own defaults: a group size, a zero point or a fit
    was for the type that it was given with, in an override that names no type too.

    Args:
        config: a :class:`QuantoConfig`, or that of another format, of which the modules count that it names as float.
        weights: the other type.
        model: what was planned with ``config``.
    """
    if not isinstance(config, QuantoConfig):
        return QuantoConfig(weights, modules_to_not_convert=config.left_in_float(model))
    overrides = {pattern: dict(values) if "weights" in values else {} for pattern, values in config.overrides.items()}
    cleared: dict[str, Any] = {"group_size": None, "symmetric": None, "fit": None, "schemes": None}
    made: QuantoConfig = replace(config, weights=weights, overrides=overrides, quant_method=METHOD, **cleared)
    return made


def _plan(empty: Empty, limits: dict[Device, int] | None, device_map: Any, context: int, batch: int) -> MemoryPlan:
    model, quantizer, dtype = empty.skeleton.model, empty.skeleton.quantizer, empty.skeleton.dtype
    dequantize = quantizer.quantization_config.dequantize
    with quiet_maps():
        places, limits = _places(empty, limits, device_map)
        sizes, _ = maps.compute_module_sizes(model, quantizer, only_modules=False)
    main = next((device for device in places.values() if device not in ("cpu", "disk")), "cpu")
    tensors = _tensor_bytes(model, sizes)
    weights = _by_device(model, tensors, places, main, limits)
    modules: dict[str, int] = {}
    for name, nbytes in tensors.items():
        owner = name.rpartition(".")[0]
        modules[owner] = modules.get(owner, 0) + nbytes
    if not empty.borrowed:
        as_loaded(model, quantizer.kept, empty.quantized, dequantize)
    cache = kv_cache(model, dtype, context, batch)
    cached = cache_by_device(model, cache, places, main)
    devices = []
    for device in sorted({*weights, *cached}, key=order):
        held, limit = weights.get(device, 0), limits.get(device) if device != "disk" else None
        transient = transient_on(quantizer.transient, device) if held else 0
        devices.append(DevicePlan(device, limit, held, cached.get(device, 0), transient))
    table = report(model)
    return MemoryPlan(
        model=type(model).__name__,
        weights=f"{empty.config.weights}{', dequantized' * dequantize}",
        dtype=str(dtype).removeprefix("torch."),
        quantized=empty.quantized,
        device_map=places,
        devices=tuple(devices),
        modules=modules,
        largest=max(modules.items(), key=lambda item: item[1], default=("", 0)),
        transient=quantizer.transient,
        kv_cache=cache,
        report=table,
        float_bytes=sum(torch.Size(row.shape).numel() for row in table.rows) * dtype.itemsize,
        nbytes=sum(weights.values()),
        others={},
        notes=(*empty.notes, *table.notes),
    )


def _places(
    empty: Empty, limits: dict[Device, int] | None, device_map: Any
) -> tuple[dict[str, Device], dict[Device, int]]:
    """The device map, by transformers itself, and the limits that it was made for."""
    placed = maps.check_and_set_device_map(device_map) or {"": "cpu"}
    if isinstance(placed, str):
        given = None if limits is None else dict(limits)
        placed = maps._get_device_map(empty.skeleton.model, placed, given, empty.skeleton.quantizer)
        # without limits, transformers takes what this machine has
        limits = {d: int(size) for d, size in maps.get_max_memory(None).items()} if limits is None else limits
    return {name: as_device(device) for name, device in placed.items()}, limits or {}


def _tensor_bytes(model: Any, sizes: Mapping[str, float]) -> dict[str, int]:
    """Bytes of each parameter and buffer; what is tied to another one is not there twice."""
    names = [*dict(model.named_parameters()), *dict(model.named_buffers())]
    return {name: int(sizes[name]) for name in names if name not in model.all_tied_weights_keys}


def _by_device(
    model: Any, tensors: Mapping[str, int], places: Mapping[str, Device], main: Device, limits: Mapping[Device, int]
) -> dict[Device, int]:
    """Bytes on each device that has some, and on the accelerators that may have some."""
    found: dict[Device, int] = {device: 0 for device in limits if device not in ("cpu", "disk")}
    buffers = {name for name, _ in model.named_buffers()}
    for name, nbytes in tensors.items():
        device = place(places, name)
        if name in buffers and (device == "disk" or (device == "cpu" and main != "cpu")):
            # hooks move weights only
            device = main
        found[device] = found.get(device, 0) + nbytes
    return found
