"""What an assignment leaves in float after all, for what the slots around it get or for its size."""

from collections.abc import Collection
from typing import Any

from torch import nn

from quanto_hf.flow.patterns import any_names
from quanto_hf.flow.refuse import DTYPES
from quanto_hf.nn.qattention import QAttentionOutput
from quanto_hf.nn.registry import entry_of, slots_of
from quanto_hf.nn.slots import find, label

ATTENTION = "the attention of torch around it stays float, and reads its weight"


def leave_others(model: nn.Module, chosen: dict[str, Any], left: dict[str, str], asked: Collection[str]) -> None:
    """Leave slots in float that nothing is gained with. Changes what an assignment has.

    - The output projection of torch's attention, if none of the others of that is quantized: nothing would round its
      weight before it is packed.
    - A slot that takes no fewer bytes packed than as it is, since its rows have no more than a few columns, unless a
      pattern names it. Other small layers are packed: with 8 columns or more each takes less than in 16 bits, and
      models of small layers (vision, audio) would be left as they are by a limit that counts weights.

    Args:
        chosen: name of a slot -> how it is quantized.
        left: name of a slot -> why it stays float.
        asked: patterns that ask for what they name.
    """
    for name, choice in list(chosen.items()):
        owner, leaf = find(model, name)
        module = model.get_submodule(owner)
        reason = _goes_with(model, owner, module, chosen)
        if reason is None and not any_names({name, owner}, asked):
            reason = _why_no_gain(getattr(module, leaf), slots_of(module)[leaf].matrix_shape, choice.scheme())
        if reason is not None:
            del chosen[name]
            left[name] = reason


def _goes_with(model: nn.Module, owner: str, module: nn.Module, chosen: dict[str, Any]) -> str | None:
    entry, outer = entry_of(module), owner.rpartition(".")[0]
    if entry is None or entry.quantized is not QAttentionOutput:
        return None
    around = model.get_submodule(outer)
    if not isinstance(around, nn.MultiheadAttention) or any(label(outer, leaf) in chosen for leaf in slots_of(around)):
        return None
    return ATTENTION


def _why_no_gain(weight: Any, shape: tuple[int, ...], scheme: Any) -> str | None:
    # another dtype is refused by name, and not left as it is
    if not scheme.by_rows or not weight.numel() or weight.dtype not in DTYPES:
        return None
    packed = sum(spec.nbytes for spec in scheme.tensors(shape, weight.dtype).values())
    if packed < weight.nbytes:
        return None
    return f"its {packed:,} bytes as {scheme} are no fewer than its {weight.nbytes:,} in float; an override packs it"
