"""Float dtypes of stored tensors: what of a checkpoint decides about them, and what cannot be right.

Scales and zeros of most schemes have one dtype, whatever the model has. Codebooks and scales of AQLM have that of the
model when it was saved, and keep it: converted, they would be other numbers.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from quanto_hf.nn import QuantizedWeight
from quanto_hf.nn.slots import joined
from quanto_hf.ops.grouped_weight import FLOATS
from quanto_hf.schemes import TensorSpec


def _floats(model: nn.Module) -> Iterator[tuple[QuantizedWeight, str, list[str]]]:
    """Each layer with tensors in the dtype of the model, what stands before their names, and their names in it."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight) and module.scheme.float_names:
            leaves = [module.slot().stored(part) for part in module.scheme.float_names]
            yield (
                module,
                f"{name}." if name else "",
                [leaf for leaf in leaves if module._parameters.get(leaf) is not None],
            )


def kept_tensors(model: nn.Module) -> dict[str, torch.dtype]:
    """Full name of each tensor of a quantized layer that keeps its dtype -> its dtype."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedWeight))
    held = {joined(name, leaf): module.held(leaf) for name, module in layers for leaf in module.kept_names}
    return {name: tensor.dtype for name, tensor in held.items() if tensor is not None}


def take_stored_dtypes(model: Any, headers: Mapping[str, TensorSpec]) -> None:
    """Let empty AQLM layers hold codebooks and scales in the dtypes of the files: they are exact then, and can be used
    where they lie.

    Args:
        model: on meta, quantized layers in place.
        headers: by the names in the files.
    """
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    for layer, before, leaves in _floats(model):
        for leaf in leaves:
            full = before + leaf
            # with a head or without
            spec = next((headers[n] for n in (full, full.removeprefix(prefix), prefix + full) if n in headers), None)
            dtypes = (
                {spec.dtype for n, spec in headers.items() if n.endswith(f".{leaf}")} if spec is None else {spec.dtype}
            )
            dtype = dtypes.pop() if len(dtypes) == 1 else None
            if dtype in FLOATS:
                empty = torch.empty_like(layer.get_parameter(leaf), dtype=dtype)
                layer._parameters[leaf] = layer.as_stored(leaf, empty)


def disagreements(model: nn.Module, found: Mapping[str, TensorSpec]) -> list[str]:
    """A line for each AQLM layer whose codebooks and scales have different dtypes, and for each whose dtype is not that
    of the others: a file in which float16 stands for bfloat16, or the other way round, holds other numbers. (float32
    may stand beside them: some models keep some layers in it.)

    Args:
        model: quantized layers in place.
        found: by the names of the model.
    """
    lines, kinds = list[str](), dict[str, Any]()
    for _, before, leaves in _floats(model):
        dtypes = {before + leaf: found[before + leaf].dtype for leaf in leaves if before + leaf in found}
        if len(set(dtypes.values())) > 1:
            texts = " and ".join(f"{name} is {_text(dtype)}" for name, dtype in dtypes.items())
            lines.append(f"wrong dtype: {texts}, but those of one layer have the same dtype")
        else:
            kinds.update({name: dtype for name, dtype in dtypes.items() if dtype is not torch.float32})
    counts = Counter(kinds.values())
    usual = _text(max(counts, key=lambda dtype: counts[dtype], default=None))
    return lines + [
        f"wrong dtype: {name} is {_text(dtype)}, but those of other layers are {usual}; allowed is that, or float32"
        for name, dtype in kinds.items()
        if _text(dtype) != usual
    ]


def _text(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
