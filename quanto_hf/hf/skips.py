"""Modules of a transformers model that stay float by default, each with its reason."""

from typing import Any

import torch

from quanto_hf.flow import matches


def default_skips(model: Any, dtype: torch.dtype, heads: bool = True) -> dict[str, str]:
    """Module name -> why it stays float.

    Args:
        model: a PreTrainedModel, usually on meta.
        dtype: the dtype in which it is loaded.
        heads: also the output head, and every other module outside of the base model: they are small or decide
            about the output directly, and a head that is not in the checkpoint is newly initialised.
    """
    skips: dict[str, str] = {}
    for target, source in model.all_tied_weights_keys.items():
        for tied, other in ((target, source), (source, target)):
            skips[tied.removesuffix(".weight")] = f"its weight is tied to {other}"
    for pattern in model._get_dtype_plan(dtype):
        for name, _ in model.named_modules():
            if matches(name, pattern):
                skips.setdefault(name, "the model keeps it in float32")
    if not heads:
        return skips
    output = model.get_output_embeddings()
    base = model.base_model
    inside = {id(module) for module in base.modules()}
    for name, module in model.named_modules():
        if module is output:
            skips.setdefault(name, "the output head stays float by default")
        elif base is not model and id(module) not in inside:
            skips.setdefault(name, "task heads stay float by default")
    return skips
