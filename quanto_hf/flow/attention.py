"""The output projection of torch's attention goes with the attention."""

from typing import Any

from torch import nn

from quanto_hf.nn.qattention import QAttentionOutput
from quanto_hf.nn.registry import entry_of, slots_of
from quanto_hf.nn.slots import label

REASON = "the attention of torch around it stays float, and reads its weight"


def leave_outputs(model: nn.Module, chosen: dict[str, Any], left: dict[str, str]) -> None:
    """Leave the output projections in float whose attention is not quantized: nothing would round their weights before
    they are packed. Changes what an assignment has."""
    for name in list(chosen):
        owner = name.rpartition(".")[0]
        try:
            module, around = model.get_submodule(name), model.get_submodule(owner)
        except AttributeError:
            # a slot of another name
            continue
        entry = entry_of(module)
        if entry is None or entry.quantized is not QAttentionOutput or not isinstance(around, nn.MultiheadAttention):
            continue
        if not any(label(owner, leaf) in chosen for leaf in slots_of(around)):
            del chosen[name]
            left[name] = REASON
