"""Whole models to additive codebooks, layer by layer: for given inputs, with the time left, resumable."""

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from quanto_hf.fit.aqlm import Layout, quantize_aqlm
from quanto_hf.fit.aqlm.memory import fit_bytes
from quanto_hf.fit.aqlm.work import products, products_per_second
from quanto_hf.flow.batches import batches, every_tensor
from quanto_hf.flow.layer_store import LayerStore, digest
from quanto_hf.flow.moments import collect_moments
from quanto_hf.flow.refuse import refuse_other_dtypes
from quanto_hf.nn import QuantizedWeight
from quanto_hf.ops.aqlm_loops import refuses_loops
from quanto_hf.ops.scratch import free
from quanto_hf.schemes import Aqlm

# Moments that are held at a time. Each set of layers costs a run over the data; an MLP of a 7B model takes 0.6 GB.
MOMENT_BYTES = 2_000_000_000


def freeze_aqlm(
    model: nn.Module,
    data: Iterable[Any] | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    iterations: int | None = None,
    moment_bytes: int = MOMENT_BYTES,
    progress: bool = True,
) -> nn.Module:
    """Pack the weights of all layers of a model that are to be AQLM, in place, and let go of the float ones.

    With ``data`` the errors of the layers' outputs are made small, not those of the weights: for 2 bits that halves
    them. Layers are taken in the order of the model, and see the data as the layers that are finished pass it on.

    Args:
        model: after ``quantize(model, "aqlm-2x8")``.
        data: batches that can be read several times: a list, a DataLoader without shuffling. A batch is a dict of
            keyword arguments, a tuple of positional ones, or one argument. None: from the weights alone.
        folder: where finished layers are kept, so that the same call goes on after an interruption.
        seed: see :func:`quanto_hf.fit.aqlm.quantize_aqlm`.
        iterations: see there.
        moment_bytes: memory for second moments of inputs; less of it means more runs over the data.
        progress: show an estimate, and a bar with the time left, on stderr.

    Returns:
        The model itself.

    Raises:
        ValueError: no layer is to be AQLM, a layer cannot be quantized (the text names it), or there is no data. Layers
            that are finished stay so.

    Warns:
        UserWarning: no data reached a layer; it is made from its weight alone.

    Example:
        >>> from quanto_hf.flow import quantize
        >>> model = quantize(nn.Sequential(nn.Linear(64, 32)), "aqlm-2x4")
        >>> freeze_aqlm(model, [torch.randn(100, 64)], progress=False)[0].scheme
        Aqlm(num_codebooks=2, nbits=4, out_group=1, in_group=8)
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedWeight) and isinstance(module.scheme, Aqlm) and not module.is_frozen
    }
    if not layers:
        raise ValueError("no layer of this model waits to be AQLM; quantize(model, 'aqlm-2x8') comes first")
    refuse_other_dtypes(model, layers)
    if data is not None and iter(data) is data:
        raise ValueError("the data is an iterator, which can be read only once; give a list or a DataLoader")
    store = None if folder is None else LayerStore(folder)
    settings = [seed, iterations]
    read = "" if data is None or store is None else digest(t for batch in batches(data) for t in every_tensor(batch))
    bar = _Bar(layers, None if data is None else moment_bytes, progress)
    rounding = {name: module.rounding for name, module in layers.items()}
    try:
        for part in _parts(layers, moment_bytes if data is not None else None):
            made: dict[str, dict[str, torch.Tensor]] = {}
            identities: dict[str, str] = {}
            for name, layer in part.items():
                if store is not None:
                    identities[name] = digest([layer.weight], layer.scheme.to_dict(), settings, read)
                    if (found := store.read(name, identities[name])) is not None:
                        made[name] = found
                        bar.skip(name)
            moments: dict[str, torch.Tensor] = {}
            waiting = [name for name in part if name not in made]
            if data is not None and waiting:
                for layer in layers.values():
                    layer.set_rounding(False)
                moments = collect_moments(model, data, waiting)
                _warn_unseen([name for name in waiting if name not in moments])
            for name in waiting:
                made[name] = _make(name, part[name], moments.pop(name, None), seed, iterations, bar)
                if store is not None:
                    store.write(name, identities[name], made[name])
            # all at once, so that a part that is resumed sees the inputs that it saw at first
            for name, tensors in made.items():
                part[name].freeze({key: tensor.to(part[name].weight.device) for key, tensor in tensors.items()})
    finally:
        free()
        for name, module in layers.items():
            module.set_rounding(rounding[name])
        bar.close()
    return model


def layout_of(scheme: Aqlm) -> Layout:
    """The layout of a scheme."""
    return Layout(scheme.num_codebooks, scheme.nbits, scheme.out_group, scheme.in_group)


def _make(
    name: str, layer: QuantizedWeight, moment: torch.Tensor | None, seed: int, iterations: int | None, bar: "_Bar"
) -> dict[str, torch.Tensor]:
    scheme = layer.scheme
    assert isinstance(scheme, Aqlm)
    try:
        found = quantize_aqlm(
            layer.to_matrix(layer.weight.detach()),
            num_codebooks=scheme.num_codebooks,
            nbits=scheme.nbits,
            out_group=scheme.out_group,
            in_group=scheme.in_group,
            hessian=moment,
            seed=seed,
            iterations=iterations,
            progress=lambda done, of: bar.show(name, done, of),
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return found._asdict()


def _parts(layers: dict[str, QuantizedWeight], moment_bytes: int | None) -> Iterator[dict[str, QuantizedWeight]]:
    """Layers in the order of the model, as many at a time as their moments fit; None: one at a time."""
    part: dict[str, QuantizedWeight] = {}
    size = 0
    for name, layer in layers.items():
        new = 4 * layer.matrix_shape[1] ** 2
        if part and (moment_bytes is None or size + new > moment_bytes):
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
            stacklevel=3,
        )


class _Bar:
    """An estimate before the start, and a bar in products, which all take about the same time."""

    def __init__(self, layers: dict[str, QuantizedWeight], moment_bytes: int | None, shown: bool) -> None:
        from tqdm import tqdm

        calibrated = moment_bytes is not None
        self.work: dict[str, float] = {}
        self.done = 0.0
        seconds = 0.0
        speeds: dict[Layout, float] = {}
        for name, layer in layers.items():
            assert isinstance(layer.scheme, Aqlm)
            layout = layout_of(layer.scheme)
            self.work[name] = products(layer.matrix_shape, layout, calibrated)
            if shown:
                if layout not in speeds:
                    speeds[layout] = products_per_second(layout, calibrated)
                seconds += self.work[name] / speeds[layout]
        if shown:
            weights = sum(layer.matrix_shape[0] * layer.matrix_shape[1] for layer in layers.values())
            print(
                f"{len(layers)} layers with {weights / 1e6:.1f} M weights to {', '.join(map(_name, speeds))}: about "
                f"{_time(seconds)} with {torch.get_num_threads()} threads, and "
                f"{max(1, round(_memory(layers, moment_bytes) / 1e6))} MB of memory besides the model",
                file=sys.stderr,
            )
        form = "{l_bar}{bar}| {elapsed} done, {remaining} left{postfix}"
        self.bar = tqdm(total=sum(self.work.values()), disable=not shown, bar_format=form, desc="aqlm")

    def show(self, name: str, done: int, of: int) -> None:
        """A layer has come so far."""
        self.bar.set_postfix_str(name, refresh=False)
        self.bar.update(self.done + self.work[name] * done / of - self.bar.n)
        if done == of:
            self.done += self.work[name]

    def skip(self, name: str) -> None:
        """A layer was there: what is left takes no part of the time so far."""
        self.done += self.work[name]
        if not self.bar.disable:
            self.bar.initial += self.work[name]
            self.bar.n += self.work[name]

    def close(self) -> None:
        self.bar.close()


def _memory(layers: dict[str, QuantizedWeight], moment_bytes: int | None) -> int:
    """Most bytes that are taken at a time: by moments, and by making one layer."""
    most = 0
    for part in _parts(layers, moment_bytes):
        moments = sum(4 * layer.matrix_shape[1] ** 2 for layer in part.values()) if moment_bytes is not None else 0
        for layer in part.values():
            assert isinstance(layer.scheme, Aqlm)
            made = fit_bytes(
                layer.matrix_shape, layout_of(layer.scheme), layer.weight.dtype, calibrated=moment_bytes is not None,
                native=refuses_loops(layer.weight.device) is None,
            )  # fmt: skip
            most = max(most, moments + made)
    return most


def _name(layout: Layout) -> str:
    return f"aqlm {layout.num_codebooks}x{layout.nbits}"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
