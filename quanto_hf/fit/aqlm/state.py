"""A weight on the way to additive codebooks: scales, codebooks and codes are improved in turn."""

import torch

from quanto_hf.fit.aqlm.books import least_squares, start
from quanto_hf.fit.aqlm.layout import Layout, decode
from quanto_hf.fit.aqlm.loops import loops_on, row_totals
from quanto_hf.fit.aqlm.metric import Metric


class State:
    """A weight, and what stands for it so far. No step ends with a larger error than it began with.

    Args:
        layout: of the groups.
        weight: float32, finite, shape (out_features, in_features).
        seed: of the start.
    """

    def __init__(self, layout: Layout, weight: torch.Tensor, seed: int) -> None:
        self.layout = layout
        self.metric: Metric | None = None
        self.loops = loops_on(weight.device)
        self.groups = layout.to_groups(weight)
        # by way of the largest value: the square of a value may be out of the range of float32
        self.set_scales(self.groups.abs().amax((1, 2)))
        squares = row_totals(self.targets.square().flatten(1)) / self.targets[0].numel()
        self.set_scales(self.scales * squares.sqrt())
        self.codebooks, self.codes = start(self.targets, self.weights, layout, seed)

    def set_scales(self, scales: torch.Tensor) -> None:
        """Take these scales, shape (row groups,). The codebooks have to make the weight over its scales, or 0 where a
        scale is 0."""
        self.scales = scales
        self.targets = torch.where(scales[:, None, None] == 0, 0.0, self.groups / scales[:, None, None])
        # what an error of a row group counts, which is made in units of its scale
        self.weights = (scales / scales.max().clamp(min=torch.finfo(torch.float32).tiny)).square()

    def fit_scales(self) -> None:
        """The scale of least error for each row group."""
        made = decode(self.codes, self.codebooks)
        image = made
        if self.metric is not None:
            image = self.layout.to_groups(self.loops.product(self.layout.to_weight(made), self.metric.hessian))
        along = row_totals((image * self.targets).flatten(1))
        square = row_totals((image * made).flatten(1))
        self.set_scales(torch.where(square > 0, self.scales * (along / square), self.scales))

    def fit_codebooks(self) -> None:
        """The codebooks of least error for the codes."""
        self.codebooks = least_squares(self.codebooks, self.codes, self.targets, self.weights, self.layout, self.metric)

    def fit_codes(self, beam: int) -> None:
        """Better codes for the codebooks."""
        if self.metric is None:
            count, width = self.layout.num_codebooks, self.layout.width
            self.loops.search(self.targets.view(-1, width), self.codebooks, self.codes.view(-1, count), beam)
            return
        metric, made = self.metric, decode(self.codes, self.codebooks)
        gradient = self.loops.product(self.layout.to_weight(self.targets - made), metric.hessian)
        self._sweep(beam, gradient, None, metric.hessian, metric.lower, metric.inverse)

    def set_metric(self, metric: Metric, beam: int) -> None:
        """Go on with the error of outputs, and choose codes for it that look ahead."""
        self.metric = metric
        factors = metric.look_ahead()
        if factors is None:
            self.fit_codes(beam)
            return
        upper, lower = factors
        weight = self.layout.to_weight(self.targets)
        self._sweep(beam, weight.clone(), weight, upper, lower, lower)

    def _sweep(self, beam: int, *problem: torch.Tensor | None) -> None:
        """Better codes for a problem: what :func:`quanto_hf.fit.aqlm.sweep.sweep` takes before the codebooks."""
        self.loops.sweep(*problem, self.codebooks, self.codes, self.layout.out_group, beam)

    def round(self, dtype: torch.dtype, beam: int) -> None:
        """Round codebooks and scales to the dtype in which they are stored, and then choose the codes.

        Raises:
            ValueError: a scale is out of the range of the dtype.
        """
        self.codebooks = self.codebooks.to(dtype).float()
        self.fit_codes(beam)
        self.fit_scales()
        rounded = self.scales.to(dtype).float()
        if not torch.isfinite(rounded).all():
            raise ValueError(f"a scale of {float(self.scales.abs().max()):.3g} is out of the range of {dtype}")
        self.set_scales(rounded)
        self.fit_codes(beam)
