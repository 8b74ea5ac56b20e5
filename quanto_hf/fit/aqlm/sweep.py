"""The codes of a whole weight for given inputs, one column group after another."""

import torch

from quanto_hf.fit.aqlm.layout import decode
from quanto_hf.fit.aqlm.search import search


def sweep(
    state: torch.Tensor,
    weight: torch.Tensor | None,
    follow: torch.Tensor,
    lower: torch.Tensor,
    to: torch.Tensor,
    codebooks: torch.Tensor,
    codes: torch.Tensor,
    out_group: int,
    beam: int,
) -> None:
    """Replace the codes by better ones for the error ``trace(E H E^T)``, in place, one column group after another.

    For each column group there are best values, and the error of others is a distance in a metric; the codes nearest to
    the best values are found by beam search. The columns to the right then see what has moved, and make up for it. Two
    ways differ in what they take the columns to the right for:

    - Codes that stay (``weight`` is None): the best values are those of the present codes plus ``(E H)_j`` times the
      inverse of the block ``H_jj``, and the metric is ``H_jj``. The state is ``E H``. No pass ends with a larger error.
    - Values that may still become anything (``weight`` is given): then ``E H E^T`` is a sum of squares, one for each
      column group, by the factors ``H = V D V^T`` with V unit upper and D block diagonal. The best values are ``W_j``
      plus ``E_i V_ij`` over the groups i before, and the metric is ``D_j``. The state is the best values, at first W.
      (Frantar and others, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022,
      for groups of columns in place of single ones.) A good start, which the other way then improves.

    Args:
        state: float32, shape (out_features, in_features), rows divided by their scales; overwritten.
        weight: None, or W, the same.
        follow: float32, shape (in_features, in_features): H, or V.
        lower: the Cholesky factor L of the metric of each column group, shape (column groups, in_group, in_group).
        to: what brings the state into this metric: ``L^-T``, or L.
        codebooks: float32, shape (K, vectors, values).
        codes: int32 from 0, shape (row groups, column groups, K).
        out_group: rows of a group.
        beam: sets of codes that are kept.
    """
    rows, columns, count = codes.shape
    in_group, width = lower.shape[-1], codebooks.shape[-1]
    cut = state.view(rows, out_group, -1)
    exact = None if weight is None else weight.view(rows, out_group, -1)
    for j in range(columns):
        here, right = slice(j * in_group, (j + 1) * in_group), slice((j + 1) * in_group, None)
        metric = (codebooks.view(-1, in_group) @ lower[j]).view(count, -1, width)
        old = codes[:, j].clone()
        targets = (cut[:, :, here] @ to[j]).reshape(rows, width)
        if exact is None:
            targets += decode(old, metric)
        new = old.clone()
        search(targets, metric, new, beam)
        codes[:, j] = new
        base = decode(old, codebooks) if exact is None else exact[:, :, here].reshape(rows, width)
        moved = (base - decode(new, codebooks)).view(rows, out_group, in_group)
        cut[:, :, right] += moved @ follow[here, right]
