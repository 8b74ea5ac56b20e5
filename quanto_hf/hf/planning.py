"""What a model will take, before anything of it is loaded: bytes per device, whether it fits, and what would."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers.integrations import accelerate as transformers_maps

from quanto_hf.flow import Report, report
from quanto_hf.hf.config import QuantoConfig
from quanto_hf.hf.empty import Empty, empty_model
from quanto_hf.hf.kv_cache import KVCache, kv_cache
from quanto_hf.hf.sizes import Transient, as_loaded

MODES = ("auto", "balanced", "balanced_low_0", "sequential")
# what is tried where a model does not fit, the most exact first
OTHERS = ("int8", "int4", "int2")

Device = int | str


@dataclass(frozen=True)
class DevicePlan:
    """What is on one device.

    Args:
        device: an index of an accelerator, "mps", "cpu" or "disk".
        limit: bytes that may be used; None if nothing limits them.
        weights: bytes of parameters and buffers.
        kv_cache: bytes of the cache of the layers that run there.
        transient: bytes that the load takes there for a moment, besides what is there to stay.
    """

    device: Device
    limit: int | None
    weights: int
    kv_cache: int
    transient: int

    @property
    def peak(self) -> int:
        """The transient is over when the cache begins to grow."""
        return self.weights + max(self.kv_cache, self.transient)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the limit."""
        return self.limit is None or self.peak <= self.limit


@dataclass(frozen=True)
class MemoryPlan:
    """What :func:`plan` found. ``str(plan)`` is a table.

    Args:
        model: name of its class.
        weights: number type, or what the checkpoint was quantized to.
        dtype: of what stays float.
        quantized: whether the checkpoint is quantized already.
        device_map: module -> device, as ``from_pretrained`` makes it.
        devices: one entry per device.
        modules: module -> bytes.
        largest: name and bytes of the largest layer.
        transient: of the layer whose quantization takes most, on an accelerator.
        kv_cache: what generation adds.
        report: one row per parameter.
        float_bytes: of the parameters, were nothing quantized.
        nbytes: of all parameters and buffers.
        others: weights -> (bytes, whether it fits), where this does not fit.
        notes: sentences about what is assumed.
    """

    model: str
    weights: str
    dtype: str
    quantized: bool
    device_map: dict[str, Device]
    devices: tuple[DevicePlan, ...]
    modules: dict[str, int]
    largest: tuple[str, int]
    transient: Transient
    kv_cache: KVCache
    report: Report
    float_bytes: int
    nbytes: int
    others: dict[str, tuple[int, bool]]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether all of it is within the limits, and where it computes: nothing on disk, and nothing in the memory of
        the CPU if there are accelerators."""
        return all(device.fits for device in self.devices) and not self.spilled

    @property
    def spilled(self) -> int:
        """Bytes on devices that do not compute."""
        accelerators = any(device.device not in ("cpu", "disk") for device in self.devices)
        away = ("cpu", "disk") if accelerators else ("disk",)
        return sum(device.weights for device in self.devices if device.device in away)

    @property
    def would_fit(self) -> list[str]:
        """Weights that make it fit; empty if it fits as it is."""
        return [weights for weights, (_, fits) in self.others.items() if fits]

    def left_in_float(self) -> list[tuple[str, str, int, int, str]]:
        """Reason, dtype, tensors, bytes, and the name of one, the most bytes first."""
        groups: dict[tuple[str, str], list[Any]] = {}
        for row in self.report.rows:
            if row.reason:
                groups.setdefault((row.reason, row.stored), []).append(row)
        found = [(*key, len(rows), sum(row.nbytes for row in rows), rows[0].name) for key, rows in groups.items()]
        return sorted(found, key=lambda item: -item[3])

    def verdict(self) -> str:
        """One sentence: whether it fits, and what would."""
        if self.fits:
            return "It fits."
        reasons = [f"{self.spilled:,} bytes are left over for devices that do not compute"] if self.spilled else []
        for d in self.devices:
            if d.limit is not None and not d.fits:
                reasons.append(f"{_name(d.device)} needs {d.peak:,} bytes of {d.limit:,}")
        said = f"It does not fit: {'; '.join(reasons)}."
        if self.would_fit:
            return f"{said} It would with weights: {', '.join(self.would_fit)}."
        if self.others:
            return f"{said} Neither would it with {', '.join(self.others)}."
        return said

    def to_dict(self) -> dict[str, Any]:
        """In JSON types."""
        keys = ("model", "weights", "dtype", "quantized", "device_map", "modules", "nbytes", "float_bytes")
        left = ("reason", "dtype", "tensors", "nbytes", "such_as")
        cache = {"nbytes": self.kv_cache.nbytes, **asdict(self.kv_cache)}
        del cache["layers"]
        return {
            **{key: getattr(self, key) for key in keys},
            "devices": [{**asdict(d), "peak": d.peak, "fits": d.fits} for d in self.devices],
            "largest": {"layer": self.largest[0], "nbytes": self.largest[1]},
            "transient": asdict(self.transient),
            "kv_cache": cache,
            "left_in_float": [dict(zip(left, item, strict=True)) for item in self.left_in_float()],
            "fits": self.fits,
            "others": {w: {"nbytes": nbytes, "fits": fits} for w, (nbytes, fits) in self.others.items()},
            "would_fit": self.would_fit,
            "verdict": self.verdict(),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        head = f"{'device':8} {'weights':>16} {'KV cache':>16} {'at load':>16} {'peak':>16} {'limit':>16}"
        lines = [f"{self.model}, {self.weights}, {self.dtype}", head]
        for d in self.devices:
            numbers = (d.weights, d.kv_cache, d.transient, d.peak)
            limit = f"{d.limit:,}" if d.limit is not None else "none"
            lines.append(f"{_name(d.device):8} " + " ".join(f"{n:16,}" for n in numbers) + f" {limit:>16}")
        lines += [
            f"{self.nbytes:,} bytes; the parameters in {self.dtype}: {self.float_bytes:,}",
            f"largest layer: {self.largest[0]}, {self.largest[1]:,} bytes",
            f"KV cache of {self.kv_cache.batch} x {self.kv_cache.context} tokens: {self.kv_cache.nbytes:,} bytes "
            f"({self.kv_cache.assumed})",
        ]
        if self.transient.nbytes:
            lines.append(
                f"quantizing {self.transient.layer} on an accelerator takes {self.transient.nbytes:,} bytes for a moment"
            )
        for reason, dtype, count, nbytes, _ in self.left_in_float():
            lines.append(f"float: {count} tensors in {dtype}, {nbytes:,} bytes: {reason}")
        return "\n".join([*lines, *self.notes, self.verdict()])


def plan(
    model: Any,
    config: QuantoConfig | None = None,
    max_memory: int | str | Mapping[Device, int | str] | None = None,
    *,
    device_map: Any = "auto",
    context: int = 4096,
    batch: int = 1,
    dtype: Any = "auto",
    auto_class: Any = None,
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

    Raises:
        ValueError: it is no model, a value is not allowed, or a file is damaged.

    Example:
        >>> import quanto_hf
        >>> plan(quanto_hf.tiny_lm(), QuantoConfig(weights="int4"), "8MiB").fits
        True
    """
    for name, value in (("context", context), ("batch", batch)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name}={value!r} is not a number of {name}s; give 0 or more")
    limits = read_max_memory(max_memory, _only_device(device_map))
    empty = empty_model(model, config, dtype, auto_class)
    found = _plan(empty, limits, device_map, context, batch)
    if found.fits or empty.source is None:
        return found
    others = {}
    for weights in OTHERS:
        if weights == empty.config.weights:
            continue
        other = empty_model(empty.source, _with_weights(empty.config, weights), "auto", type(empty.skeleton.model))
        planned = _plan(other, limits, device_map, context, batch)
        others[weights] = planned.nbytes, planned.fits
    return MemoryPlan(**{**vars(found), "others": others})


def _with_weights(config: QuantoConfig, weights: str) -> QuantoConfig:
    return QuantoConfig(
        weights=weights,
        activations=config.activations,
        modules_to_not_convert=config.modules_to_not_convert,
        overrides=config.overrides,
        default_skips=config.default_skips,
    )


def _plan(empty: Empty, limits: dict[Device, int] | None, device_map: Any, context: int, batch: int) -> MemoryPlan:
    model, quantizer, dtype = empty.skeleton.model, empty.skeleton.quantizer, empty.skeleton.dtype
    dequantize = quantizer.quantization_config.dequantize
    with _quiet():
        placed = transformers_maps.check_and_set_device_map(device_map) or {"": "cpu"}
        if isinstance(placed, str):
            if limits is None:
                # what from_pretrained asks too, so that the table shows it
                limits_used = dict(transformers_maps.get_max_memory(None))
            else:
                limits_used = dict(limits)
            placed = transformers_maps._get_device_map(model, placed, dict(limits) if limits else None, quantizer)
        else:
            limits_used = dict(limits or {})
        _, leaves = transformers_maps.compute_module_sizes(model, quantizer)
        sizes, _ = transformers_maps.compute_module_sizes(model, quantizer, only_modules=False)
    places = {name: _device(device) for name, device in placed.items()}
    main = next((device for device in places.values() if device not in ("cpu", "disk")), "cpu")
    weights: dict[Device, int] = dict.fromkeys([*_used(limits_used, places)], 0)
    buffers = {name for name, _ in model.named_buffers()}
    tied = set(model.all_tied_weights_keys)
    for name in [*dict(model.named_parameters()), *buffers]:
        if name in tied:
            continue
        device = _place(places, name)
        if name in buffers and (device == "disk" or (device == "cpu" and main != "cpu")):
            # hooks move weights only
            device = main
        weights[device] = weights.get(device, 0) + int(sizes[name])
    if not empty.borrowed:
        as_loaded(model, quantizer.kept, empty.quantized, dequantize)
    cache = kv_cache(model, dtype, context, batch)
    cached = _by_device(model, cache, places, main)
    transient = quantizer.transient
    rows = tuple(
        DevicePlan(
            device, None if device == "disk" else _limit(limits_used.get(device)), nbytes, cached.get(device, 0),
            transient.nbytes if nbytes and device not in ("cpu", "disk") else 0,
        )
        for device, nbytes in sorted(weights.items(), key=lambda item: _order(item[0]))
    )  # fmt: skip
    table = report(model)
    name, size = max(((n, int(s)) for n, s in leaves.items()), key=lambda item: item[1], default=("", 0))
    return MemoryPlan(
        model=type(model).__name__,
        weights=f"{empty.config.weights}{', dequantized' * dequantize}",
        dtype=str(dtype).removeprefix("torch."),
        quantized=empty.quantized,
        device_map=places,
        devices=rows,
        modules={name: int(size) for name, size in leaves.items()},
        largest=(name, size),
        transient=transient,
        kv_cache=cache,
        report=table,
        float_bytes=sum(torch.Size(row.shape).numel() for row in table.rows) * dtype.itemsize,
        nbytes=sum(weights.values()),
        others={},
        notes=empty.notes,
    )


# ------------------------------------------------------------------------------------------------------------ devices


def read_max_memory(given: Any, device: Device = 0) -> dict[Device, int] | None:
    """Sizes in bytes, per device.

    Args:
        given: one size, a dict of them, or None.
        device: the one that one size is for.

    Raises:
        ValueError: a size or a device is not one.

    Example:
        >>> read_max_memory("1.5GiB"), read_max_memory({0: "6GB", "cpu": 1000})
        ({0: 1610612736}, {0: 6000000000, 'cpu': 1000})
    """
    if given is None:
        return None
    if not isinstance(given, Mapping):
        return {device: _size(given)}
    if not given:
        raise ValueError("max_memory={} names no device; give a size, or a dict such as {0: '6GiB', 'cpu': '16GiB'}")
    for key in given:
        if not (isinstance(key, int) and not isinstance(key, bool) and key >= 0) and key not in ("cpu", "disk", "mps"):
            raise ValueError(f"max_memory has the device {key!r}; choose a number from 0, 'cpu', 'disk' or 'mps'")
    return {key: _size(size) for key, size in given.items()}


def _size(given: Any) -> int:
    from accelerate.utils.modeling import convert_file_size_to_int

    bad = isinstance(given, bool) or not isinstance(given, int | str)
    try:
        found = -1 if bad else convert_file_size_to_int(given)
    except (ValueError, OverflowError):
        found = -1
    if found < 0:
        raise ValueError(f"{given!r} is not a size; give a number of bytes, or one such as '6GiB', '500MiB' or '1.5GB'")
    return int(found)


def _only_device(device_map: Any) -> Device:
    """The device that one size is for."""
    if device_map is None:
        return "cpu"
    return 0 if isinstance(device_map, Mapping) or device_map in MODES else _device(device_map)


def _limit(size: float | None) -> int | None:
    return None if size is None else int(size)


def _device(device: Any) -> Device:
    found = torch.device(device) if isinstance(device, str) and device != "disk" else device
    if isinstance(found, torch.device):
        return found.type if found.type in ("cpu", "mps", "meta") else (found.index or 0)
    kept: Device = found
    return kept


def _place(places: Mapping[str, Device], name: str) -> Device:
    """The device of a tensor: that of its longest prefix in the map."""
    path = name
    while path not in places and path:
        path = path.rpartition(".")[0]
    return places.get(path, "cpu")


def _used(limits: Mapping[Device, int], places: Mapping[str, Device]) -> Iterator[Device]:
    """The devices that may be used, and those that are."""
    yield from (device for device in limits if device in places.values() or device not in ("cpu", "disk"))
    yield from places.values()


def _order(device: Device) -> tuple[int, str]:
    return (device, "") if isinstance(device, int) else (1 << 30, {"cpu": "y", "disk": "z"}.get(device, device))


def _name(device: Device) -> str:
    return f"device {device}" if isinstance(device, int) else device


def _by_device(model: Any, cache: KVCache, places: Mapping[str, Device], main: Device) -> dict[Device, int]:
    """Bytes of the cache where its layers run; an offloaded layer runs on the main device."""
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == len(cache.layers)
    ]
    # an encoder may have as many layers
    decoder = [name for name in lists if any(word in name for word in ("decoder", "language", "text"))]
    found: dict[Device, int] = {}
    for index, nbytes in enumerate(cache.layers):
        device = main
        if lists:
            device = _place(places, f"{(decoder or lists)[0]}.{index}")
        if device == "disk" or (device == "cpu" and main != "cpu"):
            device = main
        found[device] = found.get(device, 0) + nbytes
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """No words about accelerators of the plan that this machine has not."""
    loggers = [
        logging.getLogger(name) for name in ("accelerate.utils.modeling", "transformers.integrations.accelerate")
    ]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
