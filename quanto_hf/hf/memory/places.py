"""Devices of a plan: their limits, what is placed on them, and in which order they are shown."""

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from quanto_hf.hf.memory.kv_cache import KVCache

MODES = ("auto", "balanced", "balanced_low_0", "sequential")

Device = int | str


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


def only_device(device_map: Any) -> Device:
    """The device that one size is for."""
    if device_map is None:
        return "cpu"
    if isinstance(device_map, Mapping) or device_map in MODES:
        return 0
    try:
        return as_device(device_map)
    except RuntimeError:
        modes = ", ".join(map(repr, MODES))
        raise ValueError(f"device_map={device_map!r} is not known; choose {modes}, a device, a dict or None") from None


def as_device(device: Any) -> Device:
    """An entry of a device map as a number, "cpu", "disk" or "mps"."""
    found = torch.device(device) if isinstance(device, str) and device != "disk" else device
    if isinstance(found, torch.device):
        return found.type if found.type in ("cpu", "mps", "meta") else (found.index or 0)
    kept: Device = found
    return kept


def place(places: Mapping[str, Device], name: str) -> Device:
    """The device of a tensor: that of its longest prefix in the map."""
    path = name
    while path not in places and path:
        path = path.rpartition(".")[0]
    return places.get(path, "cpu")


def order(device: Device) -> tuple[int, str]:
    """Accelerators first, the disk last."""
    return (device, "") if isinstance(device, int) else (1 << 30, {"cpu": "y", "disk": "z"}.get(device, device))


def device_name(device: Device) -> str:
    """For people."""
    return f"device {device}" if isinstance(device, int) else device


def cache_by_device(model: Any, cache: KVCache, places: Mapping[str, Device], main: Device) -> dict[Device, int]:
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
            device = place(places, f"{(decoder or lists)[0]}.{index}")
        if device == "disk" or (device == "cpu" and main != "cpu"):
            device = main
        found[device] = found.get(device, 0) + nbytes
    return found


class _Hush(logging.Filter):
    """Lets nothing below an error pass in the threads that have asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        """As of logging.Filter."""
        return record.levelno >= logging.ERROR or not getattr(self.asked, "depth", 0)


_hush = _Hush()
# for good: a level that is set and put back would be one of the process
for _name in ("accelerate.utils.modeling", "transformers.integrations.accelerate"):
    logging.getLogger(_name).addFilter(_hush)


@contextmanager
def quiet_maps() -> Iterator[None]:
    """Silence warnings about planned accelerators that this machine lacks, in this thread."""
    asked = _hush.asked
    asked.depth = getattr(asked, "depth", 0) + 1
    try:
        yield
    finally:
        asked.depth -= 1
