"""Bytes of an empty model once it is loaded, as device maps count them, and what loading needs besides.

A device map is right only if every tensor counts as what it will be: stored tensors and not the float placeholder, and
in float32 what the model keeps in float32.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quanto_hf.flow import replace_modules
from quanto_hf.hf.load.names import split_name, waiting_slot
from quanto_hf.nn import QuantizedWeight
from quanto_hf.nn.slots import joined
from quanto_hf.nn.stored import bytes_each

Kept = list[tuple[re.Pattern[str], torch.dtype]]


def kept_dtypes(model: Any, dtype: torch.dtype) -> Kept:
    """Patterns of the tensors that a model keeps in another dtype than the one it is loaded in, as the loader reads
    them: anywhere in a name."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    return [(re.compile(pattern.replace("*", ".*")), kept) for pattern, kept in plan.items()]


def loaded_dtype(
    model: nn.Module, name: str, dtype: torch.dtype, kept: Kept, pre_quantized: bool = False
) -> torch.dtype:
    """The dtype that the loader gives a tensor.

    Args:
        model: the empty model, or a part of it.
        name: of a parameter or buffer of ``model``.
        dtype: of this tensor while it is empty.
        kept: of :func:`kept_dtypes`.
        pre_quantized: whether the checkpoint is quantized: then only floats are converted.
    """
    owner, leaf = split_name(model, name)
    if isinstance(owner, QuantizedWeight) and leaf in owner.kept_names:
        return dtype
    # what is in no checkpoint is made anew, as it is
    if leaf in owner._non_persistent_buffers_set or (pre_quantized and not dtype.is_floating_point):
        return dtype
    return next((found for pattern, found in kept if pattern.search(name)), dtype)


def loaded_element_size(
    model: nn.Module, name: str, tensor: torch.Tensor, kept: Kept, pre_quantized: bool, dequantize: bool
) -> float:
    """Bytes per element of a tensor after loading; 0 for one that is gone by then.

    Args:
        tensor: the empty tensor; what is an element is what its ``numel()`` counts.
        dequantize: whether the model gets float weights in plain layers.
    """
    return bytes_each(loaded_bytes(model, name, tensor, kept, pre_quantized, dequantize), tensor.numel())


def loaded_bytes(
    model: nn.Module, name: str, tensor: torch.Tensor, kept: Kept, pre_quantized: bool, dequantize: bool
) -> int:
    """Bytes of a tensor after loading, as :func:`loaded_element_size`."""
    owner, leaf = split_name(model, name)
    if dequantize and isinstance(owner, QuantizedWeight) and leaf in owner.kept_names:
        slot = owner.slot_stored_as(leaf)
        # the placeholder of a float checkpoint counts, and the first tensor of a quantized one for the float weight
        if slot is None or slot.name in owner._parameters or leaf != slot.names(owner.scheme_of(slot))[0]:
            return 0
        return slot.numel * owner.weight_dtype.itemsize
    if waiting_slot(model, name) is not None and not dequantize:
        return 0
    return tensor.shape.numel() * loaded_dtype(model, name, tensor.dtype, kept, pre_quantized).itemsize


@dataclass(frozen=True)
class Transient:
    """What the quantization of the most demanding layer takes on its device besides the result.

    Args:
        nbytes: on an accelerator: the float weight, and the temporaries.
        layer: its name; empty where nothing is quantized.
        cpu_nbytes: on the CPU, where the float weight is a mapped page of its file: what AQLM weights, for example, are
            made in. Most are quantized there in a few MB, which do not count.
        cpu_layer: the most demanding one there.
    """

    nbytes: int = 0
    layer: str = ""
    cpu_nbytes: int = 0
    cpu_layer: str = ""


def largest_transient(model: nn.Module, dtype: torch.dtype, kept: Kept) -> Transient:
    """Of all layers of an empty model that wait for a float weight.

    Args:
        dtype: in which the model is loaded; the float weight arrives in it.
        kept: of :func:`kept_dtypes`.
    """
    found, on_cpu = (0, ""), (0, "")
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedWeight))
    waiting = ((name, m, slot) for name, m in layers for slot in m.slots if slot.name in m._parameters)
    for name, module, slot in waiting:
        scheme, fit = module.scheme_of(slot), module.fit_of(slot)
        arrives = loaded_dtype(model, slot.full(name), dtype, kept)
        *rows, columns = slot.matrix_shape
        shape = torch.Size(rows).numel(), columns
        nbytes = slot.numel * arrives.itemsize + scheme.workspace_bytes(shape, arrives, fit, device="cuda")
        if nbytes > found[0]:
            found = nbytes, slot.label(name)
        # as for 16 bits, with a copy in float32: a weight that arrives in float32 is mostly a copy of one in 16 bits
        if (most := scheme.workspace_bytes(shape, torch.bfloat16, fit, device="cpu")) > on_cpu[0]:
            on_cpu = most, slot.label(name)
    return Transient(*found, *on_cpu)


def lower_by_transient(max_memory: dict[Any, Any], transient: Transient) -> dict[Any, Any]:
    """``max_memory`` in bytes, with room for the transient on every device but the disk.

    Args:
        max_memory: device -> bytes as an int or float, or a size such as "1.5GiB".
    """
    from accelerate.utils.modeling import convert_file_size_to_int

    sizes = {d: convert_file_size_to_int(size) if isinstance(size, str) else size for d, size in max_memory.items()}
    return {d: size if d == "disk" else max(0, size - transient_on(transient, d)) for d, size in sizes.items()}


def transient_on(transient: Transient, device: Any) -> int:
    """Bytes that quantizing takes on a device; what goes to disk is quantized on the CPU."""
    return 0 if device == "disk" else transient.cpu_nbytes if device == "cpu" else transient.nbytes


def as_loaded(model: Any, kept: Kept, pre_quantized: bool, dequantize: bool) -> None:
    """Make an empty model what the loaded one is, still on meta: stored tensors only, or float weights in plain layers,
    with their dtypes and ties. In place."""
    if dequantize:
        _as_dequantized(model)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            for slot in module.slots:
                module._parameters.pop(slot.name, None)
        for tensors in (module._parameters, module._buffers):
            for leaf, tensor in tensors.items():
                if tensor is None:
                    continue
                dtype = loaded_dtype(model, joined(name, leaf), tensor.dtype, kept, pre_quantized)
                if dtype != tensor.dtype:
                    empty = torch.empty_like(tensor, dtype=dtype, device="meta")
                    tensors[leaf] = nn.Parameter(empty, False) if tensors is module._parameters else empty
    if getattr(model, "all_tied_weights_keys", None):
        model.tie_weights(missing_keys=set(model.all_tied_weights_keys), recompute_mapping=False)


def _as_dequantized(model: nn.Module) -> None:
    made: dict[nn.Module, nn.Module] = {}
    for layer in model.modules():
        if isinstance(layer, QuantizedWeight):
            made[layer] = layer.empty_float("it is dequantized")
    replace_modules(model, made)
