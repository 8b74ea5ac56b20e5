"""The weights of a whole model, made layer by layer: for given inputs, with the time left, resumable."""

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from quanto_hf.fit import Context, Fit, name_of_fit
from quanto_hf.flow.batches import batches, every_tensor
from quanto_hf.flow.layer_store import LayerStore, digest
from quanto_hf.flow.moments import collect_moments
from quanto_hf.flow.refuse import refuse_other_dtypes
from quanto_hf.nn import QuantizedWeight
from quanto_hf.nn.qlinear import LinearProduct
from quanto_hf.nn.rounding import SCALE, ZERO
from quanto_hf.nn.slots import Slot
from quanto_hf.ops.scratch import free
from quanto_hf.schemes import Scheme

# Moments that are held at a time. Each set of layers costs a run over the data; an MLP of a 7B model takes 0.6 GB.
MOMENT_BYTES = 2_000_000_000


class Waiting(NamedTuple):
    """A slot that holds a float parameter, and the layer that it is of."""

    layer: QuantizedWeight
    slot: Slot

    @property
    def weight(self) -> torch.Tensor:
        """The float parameter."""
        return self.layer.read_slot(self.slot.name)

    @property
    def scheme(self) -> Scheme:
        """How it will be stored."""
        return self.layer.scheme_of(self.slot)

    @property
    def fit(self) -> Fit | str | None:
        """What finds its scales."""
        return self.layer.fit_of(self.slot)

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns), those of all experts in one."""
        *rows, columns = self.slot.matrix_shape
        return torch.Size(rows).numel(), columns


Layers = dict[str, Waiting]


def waiting_layers(model: nn.Module) -> Layers:
    """The slots of a model that hold a float parameter, by name, in the order of the model."""
    return {
        slot.label(name): Waiting(module, slot)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedWeight)
        for slot in module.slots
        if module._parameters.get(slot.name) is not None
    }


def make_layers(
    model: nn.Module,
    layers: Layers,
    data: Iterable[Any] | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    iterations: int | None = None,
    moment_bytes: int = MOMENT_BYTES,
    progress: bool = True,
) -> None:
    """Pack the weights of these layers of a model, in place; see :func:`quanto_hf.freeze`."""
    refuse_other_dtypes(model, layers)
    if data is not None and iter(data) is data:
        raise ValueError("the data is an iterator, which can be read only once; give a list or a DataLoader")
    store = None if folder is None else LayerStore(folder)
    read = "" if data is None or store is None else digest(t for batch in batches(data) for t in every_tensor(batch))
    # those whose inputs are looked at
    seen = {name for name, layer in layers.items() if data is not None and _wants_moments(layer)}
    if data is not None and not seen:
        warnings.warn("the data is not used: no layer has a scheme or a fit that wants it", stacklevel=3)
    bar = _Bar(layers, seen, moment_bytes, progress)
    rounding = {layer: layer.rounding for layer, _ in layers.values()}
    try:
        for part in _parts(layers, seen, moment_bytes):
            made: dict[str, dict[str, torch.Tensor]] = {}
            identities: dict[str, str] = {}
            for name, layer in part.items():
                if store is not None:
                    identities[name] = _identity(layer, [seed, iterations], read if name in seen else "")
                    if (found := store.read(name, identities[name])) is not None:
                        made[name] = found
                        bar.skip(name)
            moments: dict[str, torch.Tensor] = {}
            waiting = [name for name in part if name not in made]
            if wanted := [name for name in waiting if name in seen]:
                for module in rounding:
                    module.set_rounding(False)
                moments = collect_moments(model, data, wanted)
                _warn_unseen([name for name in wanted if name not in moments])
            for name in waiting:
                context = Context(moments.pop(name, None), seed, iterations, bar.of(name))
                made[name] = _make(name, part[name], context)
                bar.finish(name)
                if store is not None:
                    store.write(name, identities[name], made[name])
            # all at once, so that a part that is resumed sees the inputs that it saw at first
            for name, tensors in made.items():
                (owner, slot), device = part[name], part[name].weight.device
                owner.freeze_slot(slot, {key: tensor.to(device) for key, tensor in tensors.items()})
    finally:
        free()
        for module, was in rounding.items():
            module.set_rounding(was)
        bar.close()


def _wants_moments(waiting: Waiting) -> bool:
    """Whether its weight is made with second moments, and they can be collected: inputs of convolutions are not."""
    return isinstance(waiting.layer, nn.Linear | LinearProduct) and waiting.scheme.wants_moments(waiting.fit)


def _identity(layer: Waiting, settings: list[int | None], read: str) -> str:
    """A digest of everything that decides about the stored tensors of a layer."""
    fit = [] if layer.fit is None else [name_of_fit(layer.fit) or repr(layer.fit)]
    tensors = [layer.weight, *(t for name in (SCALE, ZERO) if (t := layer.layer.held(name)) is not None)]
    return digest(tensors, layer.scheme.to_dict(), [*settings, *fit], read)


def _make(name: str, waiting: Waiting, context: Context) -> dict[str, torch.Tensor]:
    try:
        return waiting.layer.quantized(waiting.slot.name, context)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _parts(layers: Layers, seen: set[str], moment_bytes: int) -> Iterator[Layers]:
    """Layers in the order of the model, as many at a time as the moments of those that are seen fit; where none are
    seen, one at a time."""
    part: Layers = {}
    size = 0
    for name, layer in layers.items():
        new = 4 * layer.matrix[1] ** 2 if name in seen else 0
        if part and (not seen or size + new > moment_bytes):
            yield part
            part, size = {}, 0
        part[name] = layer
        size += new
    yield part


def _warn_unseen(names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(
            f"no data reached {len(names)} layers: {', '.join(names[:3])}{more}; they are made from their weights "
            f"alone",
            stacklevel=4,
        )


class _Bar:
    """An estimate before the start, and a bar in seconds of work, of layers that are not made at once."""

    def __init__(self, layers: Layers, seen: set[str], moment_bytes: int, shown: bool) -> None:
        from tqdm import tqdm

        self.work: dict[str, float] = {}
        self.done = 0.0
        speeds: dict[tuple[Scheme, bool], float | None] = {}
        for name, layer in layers.items():
            calibrated = name in seen
            self.work[name] = layer.scheme.work(layer.matrix, calibrated)
            key = layer.scheme, calibrated
            if shown and key not in speeds:
                speeds[key] = layer.scheme.speed(calibrated)
            # without a speed: what nobody measured is done 100 million weights in a second
            self.work[name] /= speeds.get(key) or 1e8
        if shown:
            weights = sum(layer.slot.numel for layer in layers.values())
            names = ", ".join(dict.fromkeys(str(layer.scheme) for layer in layers.values()))
            print(
                f"{len(layers)} layers with {weights / 1e6:.1f} M weights to {names}: about "
                f"{_time(sum(self.work.values()))} with {torch.get_num_threads()} threads, and "
                f"{max(1, round(_memory(layers, seen, moment_bytes) / 1e6))} MB of memory besides the model",
                file=sys.stderr,
            )
        form = "{l_bar}{bar}| {elapsed} done, {remaining} left{postfix}"
        self.bar = tqdm(total=sum(self.work.values()), disable=not shown, bar_format=form, desc="layers")

    def of(self, name: str) -> Callable[[int, int], None]:
        """What is called when a layer has come so far."""

        def show(done: int, of: int) -> None:
            self.bar.set_postfix_str(name, refresh=False)
            self.bar.update(self.done + self.work[name] * done / of - self.bar.n)

        return show

    def finish(self, name: str) -> None:
        """A layer is done."""
        self.done += self.work[name]
        self.bar.update(self.done - self.bar.n)

    def skip(self, name: str) -> None:
        """A layer was there: what is left takes no part of the time so far."""
        self.done += self.work[name]
        if not self.bar.disable:
            self.bar.initial += self.work[name]
            self.bar.n += self.work[name]

    def close(self) -> None:
        self.bar.close()


def _memory(layers: Layers, seen: set[str], moment_bytes: int) -> int:
    """Most bytes that are taken at a time: by moments, and by making one layer."""
    most = 0
    for part in _parts(layers, seen, moment_bytes):
        moments = sum(4 * layer.matrix[1] ** 2 for name, layer in part.items() if name in seen)
        for name, layer in part.items():
            made = layer.scheme.workspace_bytes(
                layer.matrix, layer.weight.dtype, layer.fit,
                device=layer.weight.device.type, calibrated=name in seen,
            )  # fmt: skip
            most = max(most, moments + made)
    return most


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
