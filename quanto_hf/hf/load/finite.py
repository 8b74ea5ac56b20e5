"""Scales that are no numbers: found once, when a quantized checkpoint has been loaded."""

from typing import Any

import torch

from quanto_hf.io import CheckpointError
from quanto_hf.nn import QuantizedWeight

MOST = 10


def refuse_not_finite(model: Any) -> None:
    """Refuse a checkpoint whose scales, zeros or codebooks are NaN or infinite: whatever such a layer computes is.

    They are summed, which is one pass over a few percent of the bytes, and waits once for each device. What is on disk
    stays there, for ``quanto-hf inspect --verify`` to read.

    Raises:
        CheckpointError: names the tensors.
    """
    sums: dict[torch.device, list[tuple[str, torch.Tensor, torch.Tensor]]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedWeight):
            continue
        for leaf in module.stored_names:
            tensor = module._parameters.get(leaf)
            if tensor is not None and tensor.is_floating_point() and not tensor.is_meta:
                total = tensor.detach().sum(dtype=torch.float32)
                sums.setdefault(tensor.device, []).append((f"{name}.{leaf}" if name else leaf, tensor, total))
    bad: list[str] = []
    for found in sums.values():
        finite = torch.isfinite(torch.stack([total for *_, total in found])).tolist()
        # large numbers may have an infinite sum
        bad += [n for (n, t, _), fine in zip(found, finite, strict=True) if not fine and not torch.isfinite(t).all()]
    if bad:
        more = f"\n  and {len(bad) - MOST} more" if len(bad) > MOST else ""
        raise CheckpointError(
            "the checkpoint is damaged: these tensors have NaN or infinite values\n  " + "\n  ".join(bad[:MOST]) + more
        )
