"""Codebooks and scales of additive codes, while they are trained with the codes as they are."""

import torch
import torch.nn.functional as F

from quanto_hf.fit.aqlm import Layout, read_codes
from quanto_hf.schemes.stored import Tensors, Trainable


class TrainableBooks(Trainable):
    """Codebooks and scales in float32. The scales are trained as their logarithm relative to where they were: a step
    then moves a small scale as much, in proportion, as a large one.

    Args:
        tensors: ``codes``, ``codebooks`` and ``scales`` of :class:`quanto_hf.schemes.Aqlm`.
        layout: of the blocks.
    """

    def __init__(self, tensors: Tensors, layout: Layout) -> None:
        self.tensors, self.layout = tensors, layout
        self.codes = read_codes(tensors["codes"], layout).long()
        self.size = tensors["codebooks"].float().square().mean().sqrt().clamp(min=1e-30)
        # the entries in units of their size, so that one learning rate serves all layers
        self.codebooks = (tensors["codebooks"].float() / self.size).requires_grad_()
        self.start = tensors["scales"].float()
        self.gain = torch.zeros_like(self.start).requires_grad_()
        self.values = [self.codebooks, self.gain]

    def weight(self) -> torch.Tensor:
        books = self.codebooks.flatten(2)
        groups = F.embedding(self.codes[..., 0], books[0])
        for k in range(1, books.shape[0]):
            groups = groups + F.embedding(self.codes[..., k], books[k])
        rows, columns = groups.shape[:2]
        cut = groups.view(rows, columns, *self.codebooks.shape[2:]) * (self.start * self.gain.exp() * self.size)
        return cut.transpose(1, 2).reshape(rows * self.layout.out_group, columns * self.layout.in_group)

    def store(self) -> None:
        self.tensors["codebooks"].copy_(self.codebooks * self.size)
        self.tensors["scales"].copy_(self.start * self.gain.exp())
