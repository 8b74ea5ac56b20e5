"""A weight as additive codebooks: codes, codebooks and scales."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from quanto_hf.fit.aqlm.layout import Layout, decode, read_codes, stored_codes
from quanto_hf.fit.aqlm.metric import Metric, large_first
from quanto_hf.fit.aqlm.state import State
from quanto_hf.ops.aqlm_loops import MAX_BEAM

# Sets of codes that are kept. Gaussian 2x8g8 after 4 iterations: 0.3052 with 4, 0.3021 with 8, 0.3008 with 16, which
# takes 1.6 times as long.
BEAM = 8
# Rounds of scales, codebooks and codes: with no data, and for given inputs after a start of 2 without.
ITERATIONS, ITERATIONS_WITH_HESSIAN, WARM_UP = 5, 2, 2


class AqlmTensors(NamedTuple):
    """A weight as additive codebooks, in the format of AQLM.

    Args:
        codes: the smallest signed integers that hold a code, shape (row groups, column groups, K).
        codebooks: floats, shape (K, 2 ** nbits, out_group, in_group).
        scales: floats, shape (row groups, 1, 1, 1).
    """

    codes: torch.Tensor
    codebooks: torch.Tensor
    scales: torch.Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that they stand for, computed in float32; shape (out_features, in_features)."""
        count, size, out_group, in_group = self.codebooks.shape
        layout = Layout(count, size.bit_length() - 1, out_group, in_group)
        groups = decode(read_codes(self.codes, layout), self.codebooks.float().flatten(2))
        return layout.to_weight(groups * self.scales.float().view(-1, 1, 1)).to(dtype)


def quantize_aqlm(
    weight: torch.Tensor,
    *,
    num_codebooks: int,
    nbits: int,
    out_group: int = 1,
    in_group: int = 8,
    hessian: torch.Tensor | None = None,
    seed: int = 0,
    iterations: int | None = None,
    beam: int = BEAM,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> AqlmTensors:
    """Quantize a weight to sums of vectors from a few codebooks, with one scale per row.

    The format is that of AQLM (Egiazarian and others, "Extreme Compression of Large Language Models via Additive
    Quantization", 2024). The way there has no gradient steps: residual k-means, then in turn the scales in closed form,
    all codebooks by least squares and the codes by beam search. With a ``hessian`` the same for the error of the
    layer's outputs, where each column group makes up for the errors of those before it. On a CPU with the native
    library the result is the same to the last bit for any number of threads.

    Args:
        weight: floats, shape (out_features, in_features).
        num_codebooks: K, vectors that are added up for each group of weights.
        nbits: bits of a code, 1 to 16; a codebook has ``2 ** nbits`` vectors.
        out_group: rows of a group, which share a scale.
        in_group: columns of a group.
        hessian: second moment of the inputs, ``X.T @ X / n`` (:func:`quanto_hf.flow.collect_moments`), shape
            (in_features, in_features), or None. 1 % of the mean of its diagonal is added.
        seed: of the first vectors of k-means.
        iterations: rounds of the three steps; None is 5 without and 2 with a ``hessian``.
        beam: sets of codes that are kept for each group, 1 to 64.
        dtype: of the codebooks and scales, to which they are rounded before the final codes are chosen; None is that of
            the weight.
        progress: called with the steps that are done and all steps.

    Raises:
        ValueError: a size is not a whole number, a value is out of range, the features cannot be divided into groups,
            or the weight or ``hessian`` is not finite. Before anything is computed.

    Example:
        >>> weight = torch.randn(64, 128)
        >>> codes, codebooks, scales = quantize_aqlm(weight, num_codebooks=2, nbits=4)
        >>> codes.shape, codes.dtype, codebooks.shape, scales.shape
        (torch.Size([64, 16, 2]), torch.int8, torch.Size([2, 16, 1, 8]), torch.Size([64, 1, 1, 1]))
    """
    layout = Layout(num_codebooks, nbits, out_group, in_group)
    if (reason := layout.refuses()) is not None:
        raise ValueError(reason)
    layout.grid(tuple(weight.shape))
    dtype = weight.dtype if dtype is None else dtype
    _check(weight, hessian, iterations, beam, dtype)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False), torch.device(weight.device):
        values, order = weight.detach().float(), None
        metric = None
        if hessian is not None:
            # large inputs first, so that those with errors that count less make up for them
            order = large_first(hessian.diagonal(), layout).to(weight.device)
            columns = (order[:, None] * in_group + torch.arange(in_group, dtype=torch.int64)).flatten()
            values, hessian = values[:, columns], hessian.to(weight.device)[columns][:, columns]
            metric = Metric.of(hessian, layout)
        count = (ITERATIONS if metric is None else ITERATIONS_WITH_HESSIAN) if iterations is None else iterations
        warm_up = 0 if metric is None else WARM_UP
        steps = 1 + warm_up + count + 1
        report = progress if progress is not None else lambda done, of: None
        state = State(layout, values, seed)
        for i in range(warm_up + count):
            report(1 + i, steps)
            if i == warm_up and metric is not None:
                # the codes that the warm-up chose know nothing of the inputs
                state.set_metric(metric, beam)
            state.fit_scales()
            state.fit_codebooks()
            if i + 1 < warm_up + count:  # the last codes are chosen for rounded codebooks
                state.fit_codes(beam)
        report(steps - 1, steps)
        state.round(dtype, beam)
        report(steps, steps)
        if order is not None:
            state.codes = state.codes[:, order.argsort()]
        codebooks = state.codebooks.view(num_codebooks, -1, out_group, in_group).to(dtype)
        return AqlmTensors(stored_codes(state.codes, layout), codebooks, state.scales.view(-1, 1, 1, 1).to(dtype))


def _check(
    weight: torch.Tensor, hessian: torch.Tensor | None, iterations: int | None, beam: int, dtype: torch.dtype
) -> None:
    if not weight.dtype.is_floating_point or not dtype.is_floating_point:
        raise ValueError(f"the weight is {weight.dtype}, to be stored as {dtype}; both must be floats")
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has NaN or infinite values, which cannot be quantized")
    if iterations is not None and iterations < 1:
        raise ValueError(f"iterations={iterations} is out of range; choose 1 or more")
    if not 1 <= beam <= MAX_BEAM:
        raise ValueError(f"beam={beam} is out of range; choose 1 to {MAX_BEAM}")
    columns = weight.shape[1]
    if hessian is not None and hessian.shape != (columns, columns):
        raise ValueError(
            f"the hessian has the shape {list(hessian.shape)}; for this weight it must be [{columns}, {columns}]"
        )
