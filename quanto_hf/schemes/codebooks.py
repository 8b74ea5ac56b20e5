"""What the codebooks of AQLM layers cost, in words."""

import torch

from quanto_hf.schemes.aqlm import Aqlm

# Bits per weight. The published 1x16 has 0.5 at 4096 x 4096, and 8 at 1024 x 1024.
COSTLY = 0.5


def costly_codebooks(layers: dict[str, tuple[Aqlm, tuple[int, int], torch.dtype]]) -> str | None:
    """A sentence about the layers whose codebooks take more than half a bit per weight, or None.

    Args:
        layers: name -> scheme, shape and float dtype.

    Example:
        >>> print(costly_codebooks({"fc": (Aqlm(1, 16), (1024, 1024), torch.float16)}))
        the codebooks of 1 AQLM layer take more than 0.5 bits per weight, at most 8.0 (fc: 10.02 bits in all); ...
    """
    costs = {name: scheme.codebook_bits(shape, dtype) for name, (scheme, shape, dtype) in layers.items()}
    costly = [name for name, bits in costs.items() if bits > COSTLY]
    if not costly:
        return None
    worst = max(costly, key=costs.__getitem__)
    scheme, shape, dtype = layers[worst]
    return (
        f"the codebooks of {len(costly)} AQLM layer{'s' * (len(costly) > 1)} take more than {COSTLY} bits per weight, "
        f"at most {costs[worst]:.1f} ({worst}: {scheme.bits(shape, dtype):.2f} bits in all); fewer bits per code make "
        f"smaller codebooks, and small layers may stay float"
    )
