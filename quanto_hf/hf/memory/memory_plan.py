"""The result of a plan: bytes per device, what stays float, whether it fits."""

from dataclasses import asdict, dataclass
from typing import Any

from quanto_hf.flow import Report
from quanto_hf.hf.memory.kv_cache import KVCache
from quanto_hf.hf.memory.places import Device, device_name
from quanto_hf.hf.memory.sizes import Transient


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
    def left_over(self) -> list[DevicePlan]:
        """Devices that hold weights and do not compute: what did not fit elsewhere."""
        accelerators = any(device.device not in ("cpu", "disk") for device in self.devices)
        away = ("cpu", "disk") if accelerators else ("disk",)
        return [device for device in self.devices if device.device in away and device.weights]

    @property
    def spilled(self) -> int:
        """Bytes of weights on them."""
        return sum(device.weights for device in self.left_over)

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
                reasons.append(f"{device_name(d.device)} needs {d.peak:,} bytes of {d.limit:,}")
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
            "packed": self.report.packed.to_dict(),
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
        lines = [f"{self.model}, {self.weights}, {self.dtype}; {self.report.packed}", head]
        for d in self.devices:
            numbers = (d.weights, d.kv_cache, d.transient, d.peak)
            limit = f"{d.limit:,}" if d.limit is not None else "none"
            lines.append(f"{device_name(d.device):8} " + " ".join(f"{n:16,}" for n in numbers) + f" {limit:>16}")
        lines += [
            f"{self.nbytes:,} bytes; the parameters in {self.dtype}: {self.float_bytes:,}",
            f"largest layer: {self.largest[0]}, {self.largest[1]:,} bytes",
            f"KV cache of {self.kv_cache.batch} x {self.kv_cache.context} tokens: {self.kv_cache.nbytes:,} bytes "
            f"({self.kv_cache.assumed})",
        ]
        if self.transient.nbytes:
            said = f"{self.transient.nbytes:,} bytes"
            lines.append(f"quantizing {self.transient.layer} on an accelerator takes {said} for a moment")
        if self.transient.cpu_nbytes:
            said = f"{self.transient.cpu_nbytes:,} bytes"
            lines.append(f"quantizing {self.transient.cpu_layer} on the CPU takes {said} for a while")
        for reason, dtype, count, nbytes, _ in self.left_in_float():
            lines.append(f"float: {count} tensors in {dtype}, {nbytes:,} bytes: {reason}")
        return "\n".join([*lines, *self.notes, self.verdict()])
