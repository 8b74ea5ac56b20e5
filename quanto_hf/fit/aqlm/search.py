"""The codes of groups: beam search over the codebooks, one after another."""

import torch

from quanto_hf.fit.aqlm.layout import decode

# Numbers that are compared at a time: 16 MB.
BLOCK_VALUES = 1 << 22


def search(targets: torch.Tensor, codebooks: torch.Tensor, codes: torch.Tensor, beam: int) -> None:
    """Replace the codes of each group by better ones, in place.

    The sets of codes grow by one codebook after another. Of all ways to add a vector of the next codebook to one of the
    kept sets, the ``beam`` nearest to the target are kept (Babenko and Lempitsky, "Additive quantization for extreme
    vector compression", 2014). A group whose present codes are as near as the best of them keeps them.

    Args:
        targets: float32, shape (groups, values), contiguous.
        codebooks: float32, shape (K, vectors, values), contiguous.
        codes: int32 from 0, shape (groups, K), contiguous.
        beam: sets of codes that are kept.
    """
    step = max(1, BLOCK_VALUES // (beam * codebooks.shape[1]))
    half = codebooks.square().sum(-1) / 2
    for start in range(0, targets.shape[0], step):
        block, present = targets[start : start + step], codes[start : start + step]
        found = _grown(block, codebooks, half, beam)
        nearer = _distance(block, codebooks, found) < _distance(block, codebooks, present)
        present.copy_(torch.where(nearer, found, present))


def _grown(targets: torch.Tensor, codebooks: torch.Tensor, half: torch.Tensor, beam: int) -> torch.Tensor:
    """The best set of codes that is found, shape (groups, K)."""
    count, size = codebooks.shape[:2]
    groups = torch.arange(targets.shape[0], device=targets.device, dtype=torch.int64)[:, None]
    rest = targets.unsqueeze(1)  # (groups, kept sets, values): what their vectors leave of the target
    kept = torch.empty(targets.shape[0], 1, 0, dtype=torch.int64, device=targets.device)
    for k in range(count):
        # half the squared distance
        distance = rest.square().sum(-1, keepdim=True) / 2 + half[k] - rest @ codebooks[k].T
        flat = distance.flatten(1)
        wanted = min(beam if k + 1 < count else 1, flat.shape[1])
        best = flat.topk(wanted, dim=1, largest=False).indices
        parent, code = best // size, best % size
        kept = torch.cat([kept[groups, parent], code.unsqueeze(-1)], -1)
        rest = rest[groups, parent] - codebooks[k][code]
    return kept[:, 0].to(torch.int32)


def _distance(targets: torch.Tensor, codebooks: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return (targets - decode(codes, codebooks)).square().sum(-1, keepdim=True)
