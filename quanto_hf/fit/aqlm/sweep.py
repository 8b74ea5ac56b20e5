"""The codes of a whole weight for given inputs, one column group after another."""

import torch

from quanto_hf.fit.aqlm.search import search


def sweep(
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    lower: torch.Tensor,
    inverse: torch.Tensor,
    codebooks: torch.Tensor,
    codes: torch.Tensor,
    out_group: int,
    beam: int,
) -> None:
    """Replace the codes by better ones for the error ``trace(E H E^T)``, in place.

    For each column group j, with everything else as it is, the best values are the present ones plus ``(E H)_j`` times
    the inverse of the block ``H_jj``, and the error of others is a distance in the metric of ``H_jj``. The codes nearest
    to these values are found by beam search; the columns to the right then see what has changed, and make up for it
    (Frantar and others, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022).

    Args:
        gradient: ``E @ hessian`` for the error E of the weight, whose rows are divided by their scales; float32, shape
            (out_features, in_features); overwritten.
        hessian: H, float32, shape (in_features, in_features).
        lower: the Cholesky factors L of the blocks, ``H_jj = L @ L.T``, shape (column groups, in_group, in_group).
        inverse: their inverses, transposed.
        codebooks: float32, shape (K, vectors, values).
        codes: int32 from 0, shape (row groups, column groups, K).
        out_group: rows of a group.
        beam: sets of codes that are kept.
    """
    count, size, width = codebooks.shape
    rows, columns, _ = codes.shape
    in_group = lower.shape[-1]
    cut = gradient.view(rows, out_group, columns * in_group)
    for j in range(columns):
        here = slice(j * in_group, (j + 1) * in_group)
        metric = (codebooks.view(-1, in_group) @ lower[j]).view(count, size, width)
        old = codes[:, j].contiguous()
        vectors = sum(metric[k][old[:, k]] for k in range(count))
        assert isinstance(vectors, torch.Tensor)
        targets = vectors + (cut[:, :, here] @ inverse[j]).reshape(rows, width)
        new = old.clone()
        search(targets, metric, new, beam)
        codes[:, j] = new
        moved = sum(codebooks[k][old[:, k]] - codebooks[k][new[:, k]] for k in range(count))
        assert isinstance(moved, torch.Tensor)
        cut[:, :, here.stop :] += moved.view(rows, out_group, in_group) @ hessian[here, here.stop :]
