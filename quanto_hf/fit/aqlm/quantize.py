"""A weight as additive codebooks: codes, codebooks and scales."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quanto_hf.fit.aqlm import books, loops
from quanto_hf.fit.aqlm.layout import Layout, decode, stored_codes
from quanto_hf.fit.aqlm.metric import Metric

BEAM = 4
ITERATIONS = 6


@dataclass
class State:
    """A weight that is being quantized.

    Args:
        layout: of the groups.
        groups: the weight, float32, shape (row groups, column groups, values).
        metric: of the error; None is the plain squared error.
    """

    layout: Layout
    groups: torch.Tensor
    metric: Metric | None

    def __post_init__(self) -> None:
        # by way of the largest value, whose square may be too large or too small for float32
        largest = self.groups.abs().amax((1, 2))
        self.scales = largest
        self.scales = largest * self.targets.square().mean((1, 2)).sqrt()

    @property
    def targets(self) -> torch.Tensor:
        """The weight over its scales, which the codebooks have to make; rows of zeros stay zero."""
        return torch.where(self.scales == 0, 0.0, self.groups / self.scales[:, None, None]) if False else (
            self.groups * torch.where(self.scales == 0, 0.0, 1 / self.scales)[:, None, None]
        )

    @property
    def weights(self) -> torch.Tensor:
        return (self.scales / self.scales.max().clamp(min=1e-30)).square()

    def start(self, seed):
        self.codebooks, self.codes = books.start(self.targets, self.weights, self.layout, seed)

    def error(self):
        e = self.targets - decode(self.codes, self.codebooks)
        m = self.layout.to_weight(e)
        h = m if self.metric is None else loops.product(m, self.metric.hessian)
        w = self.layout.to_weight(self.targets)
        hw = w if self.metric is None else loops.product(w, self.metric.hessian)
        each = lambda a: (a.view(self.scales.shape[0], -1).double().sum(1) * self.weights).sum()
        return float((each(m * h) / each(w * hw)).sqrt())

    def fit_books(self):
        self.codebooks = books.least_squares(self.codebooks, self.codes, self.targets, self.weights, self.layout, self.metric)

    def fit_codes(self, beam=BEAM):
        K = self.codes.shape[-1]
        if self.metric is None:
            t = self.targets.view(-1, self.layout.width)
            loops.search(t, self.codebooks, self.codes.view(-1, K), beam)
        else:
            e = self.targets - decode(self.codes, self.codebooks)
            g = loops.product(self.layout.to_weight(e), self.metric.hessian)
            loops.sweep(g, self.metric.hessian, self.metric.lower, self.metric.inverse, self.codebooks, self.codes, self.layout.out_group, beam)

    def fit_scales(self):
        q, t = decode(self.codes, self.codebooks), self.targets
        if self.metric is not None:
            q2 = self.layout.to_groups(loops.product(self.layout.to_weight(q), self.metric.hessian))
        else:
            q2 = q
        a = loops.row_totals((q2 * t).flatten(1)); b = loops.row_totals((q2 * q).flatten(1))
        self.scales = self.scales * torch.where(b > 0, a / b, 1.0)
