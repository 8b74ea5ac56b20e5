"""The kinds of quantized weights that go through the ops.

A weight is a value: its stored tensors, and the facts that say what they stand for. Each kind has the same methods:
``check``, ``dense`` (the definition), ``blocks`` and ``rows`` (for kernels), ``key`` and ``random`` (for self-checks).
"""

from quanto_hf.ops.aqlm_weight import AqlmWeight, sample_aqlm
from quanto_hf.ops.grouped_weight import GroupedWeight, sample_weights

Weight = GroupedWeight | AqlmWeight

KINDS: tuple[type[Weight], ...] = (GroupedWeight, AqlmWeight)

# In front of the names of ops, and the fields as arguments of operators of torch.
PREFIXES = {GroupedWeight: "", AqlmWeight: "aqlm_"}
SCHEMAS = {
    GroupedWeight: "Tensor packed, Tensor scale, Tensor? zero, str qtype, int group_size, int in_features",
    AqlmWeight: "Tensor codes, Tensor codebooks, Tensor scales",
}

__all__ = ["KINDS", "PREFIXES", "SCHEMAS", "AqlmWeight", "GroupedWeight", "Weight", "samples"]


def samples() -> list[Weight]:
    """Random weights of every kind and number type, for tests."""
    return [*sample_weights(), *sample_aqlm()]
