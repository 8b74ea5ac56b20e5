"""Linear layers timed beside torch's own, each compared with the reference before it is timed."""

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from quanto_hf import QLinear
from quanto_hf.cli.kernels import chosen_kernel
from quanto_hf.cli.peers import Make, peer_layers
from quanto_hf.ops import linear_op, linear_rounded_op, round_activations
from quanto_hf.qtypes import QType
from quanto_hf.schemes import Grouped

# Copies of a weight that take turns: more than any cache holds, but no more copies than this of a small one.
ROTATED_BYTES, MOST_COPIES = 256 << 20, 512
# Relative error above which a kernel is wrong: rounding of the weight and of the result in the dtype of x.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}

Layer = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def bench_linear(
    schemes: list[Grouped],
    shape: tuple[int, int],
    counts: list[int],
    dtype: torch.dtype,
    rounds: int,
    peers: bool,
    activations: list[QType] | None = None,
    static: bool = False,
) -> Iterator[dict[str, Any]]:
    """A row for each layer and number of rows of x, with ``seconds``, ``torch_seconds``, ``ratio`` (above 1: faster
    than torch), ``error`` (against the reference on the same quantized weight; None for peers), ``distance`` (from the
    product with the float weight) and ``kernel``. A layer that is not timed has ``reason`` instead.

    Args:
        activations: number types of x; each scheme is timed with each of them too.
        static: also with one scale for all of x, besides a scale per token.
    """
    generator = torch.Generator().manual_seed(0)
    plain = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype, device="meta")
    # std 1/sqrt(in): outputs of size 1, whatever the width
    weight = torch.randn(shape, generator=generator, dtype=torch.float32) * shape[1] ** -0.5
    plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    inputs = {
        count: torch.randn(count, shape[1], generator=generator, dtype=torch.float32).to(dtype) for count in counts
    }
    exact = {count: x.float() @ plain.weight.float().T for count, x in inputs.items()}
    floats = rotation(partial(copy.deepcopy, plain), plain.weight.nbytes)
    ways = [(kind, fixed) for kind in activations or [] for fixed in ((False, True) if static else (False,))]
    for scheme, (kind, fixed) in itertools.product(schemes, [(None, False), *ways]):
        layer = QLinear.from_module(plain, scheme, kind)
        layer.freeze()
        if kind is not None and fixed:
            layer.make_static(max(float(x.abs().max()) for x in inputs.values()) / kind.qmax)
        copies = rotation(partial(copy.deepcopy, layer), sum(t.nbytes for t in layer.tensors().values()))
        stored = scheme.weight(layer.tensors(), shape[1])
        quantized = stored.dense(torch.float32)
        for count, x in inputs.items():
            row: dict[str, Any] = {
                "layer": str(scheme),
                "rows": count,
                "kernel": chosen_kernel(linear_op, (x, stored, None)),
            }
            rounded = x.float()
            if kind is not None:
                rounded = round_activations(x, kind, scheme.activation_group(kind), layer.static_scale)
                row["layer"] += f", {'static ' if fixed else ''}{kind} x"
                kernel = chosen_kernel(linear_rounded_op, (x, stored, None, kind.name, layer.static_scale))
                row["kernel"] = kernel if kernel == "native_int8" else f"rounding, {row['kernel']}"
            row |= {"error": relative(layer(x), rounded @ quantized.T), "distance": relative(layer(x), exact[count])}
            if row["error"] <= ALLOWED[dtype]:
                yield row | time_pair(floats, copies, x, rounds)
            else:
                yield row | {"reason": f"{row['kernel']} is {row['error']:.1%} off the reference: not timed"}
    for name, make in peer_layers({scheme.qtype for scheme in schemes}) if peers else ():
        row = {"layer": name, "kernel": "", "error": None}
        try:
            peer = _remake(make, plain)
            # made anew: not every layer can be copied
            copies = rotation(partial(_remake, make, plain), stored_bytes(peer))
            for count, x in inputs.items():
                distance = relative(peer(x), exact[count])
                yield row | {"rows": count, "distance": distance} | time_pair(floats, copies, x, rounds)
        except Exception as error:  # whatever another library raises is a reason
            first = (str(error).strip().splitlines() or [""])[0][:150]
            yield row | {"rows": None, "reason": f"{type(error).__name__}: {first}"}


def _remake(make: Make, plain: nn.Linear) -> nn.Module:
    return make(copy.deepcopy(plain))


def rotation(make: Callable[[], nn.Module], nbytes: int) -> Iterator[Layer]:
    """Layers without end, each with a weight of its own; it goes on where the last caller stopped."""
    count = min(MOST_COPIES, max(2, -(-ROTATED_BYTES // nbytes)))
    return itertools.cycle([make() for _ in range(count)])


def stored_bytes(layer: nn.Module) -> int:
    """Bytes of all tensors of a layer, of those inside of a tensor subclass too."""
    found = [*layer.parameters(), *layer.buffers()]
    total = 1
    while found:
        tensor = found.pop()
        names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else None
        found += [getattr(tensor, name) for name in names or ()]
        total += tensor.nbytes if names is None else 0
    return total


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Distance over length; infinite where there are NaN."""
    error = float((found.float() - exact).norm() / exact.norm())
    return error if error == error else float("inf")


def time_pair(first: Iterator[Layer], second: Iterator[Layer], x: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of two layers that take turns, so that a machine that slows down slows both."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds + 2):
        for side, layers in zip(times, (first, second), strict=True):
            layer = next(layers)
            start = time.perf_counter()
            layer(x)
            # the first two warm up
            if i >= 2:
                side.append(time.perf_counter() - start)
    theirs, ours = (statistics.median(side) for side in times)
    return {"torch_seconds": theirs, "seconds": ours, "ratio": theirs / ours}
