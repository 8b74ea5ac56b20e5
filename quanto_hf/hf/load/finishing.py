"""The last steps of loading: layers are packed, prepared for training or calibration, or made float."""

from typing import Any

import torch

from quanto_hf.flow import dequantize
from quanto_hf.flow.ties import float_slots, pack
from quanto_hf.hf.load.replace import finish_prepared
from quanto_hf.hf.load.ties import note_ties, untie_parts
from quanto_hf.hf.offload.deferred import Deferred
from quanto_hf.hf.offload.hooks import add_to_index, folder_of, offload_hooks, use_in_place, where_it_runs
from quanto_hf.nn import QuantizedInput, QuantizedWeight


def finish_offload(model: Any, deferred: Deferred | None, copied: int) -> None:
    """Write what goes to disk, and use it, and the checkpoint's own files, in place.

    Args:
        deferred: the tensors that are made now, or None.
        copied: of :func:`quanto_hf.hf.offload.hooks.use_in_place`.

    Raises:
        ValueError: there are such tensors, and no offload folder.
    """
    hooks = offload_hooks(model)
    if deferred is not None and deferred.taken:
        folder = folder_of(hooks)
        if folder is None:
            raise ValueError(
                f"device_map leaves {len(deferred.taken)} weights on disk that are quantized or merged now, but no "
                "offload_folder says where; give offload_folder=... to from_pretrained, or save the model quantized "
                "and load that"
            )
        add_to_index(hooks, deferred.write(model, folder))
    if hooks:
        use_in_place(model, hooks, copied)


def finish_layers(model: Any, config: Any) -> None:
    """Pack what has arrived as floats, and prepare layers for training or calibration, as the config asks.

    Raises:
        ValueError: a float parameter has not arrived; the text names all of them.
    """
    untie_parts(model)
    # only now: until here they said what the checkpoint holds
    for flag in config.asked:
        setattr(config, flag, True)
    absent = [
        slot.full(name)
        for name, module, slot in float_slots(model)
        if (weight := module._parameters[slot.name]) is not None and weight.device.type == "meta"
    ]
    if not config.qat and not absent:
        # a converter whose first tensor stays float hands the others over as they are
        pack(model)
    for module in model.modules():
        if not isinstance(module, QuantizedWeight) or absent:
            continue
        if config.qat:
            finish_prepared(module, config)
            continue
        if config.static_activations and isinstance(module, QuantizedInput) and module.rounds_inputs:
            if not module.is_static:
                module.make_static(device=where_it_runs(module))
        for kept in module.kept_names:
            # the loader marks every float parameter as trainable
            if (tensor := module.held(kept)) is not None:
                tensor.requires_grad_(False)
    if absent:
        raise ValueError(
            "the checkpoint does not fit the model:\n  " + "\n  ".join(f"missing: {name}" for name in absent)
        )
    note_ties(model)


def dequantized(model: Any, dtype: torch.dtype | str | None = None) -> Any:
    """The model with float weights in plain layers, in place.

    Args:
        dtype: what all of it is converted to, or None.

    Raises:
        ValueError: weights are offloaded.
    """
    places = getattr(model, "hf_device_map", {}).values()
    if "disk" in places or any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise ValueError("a model with offloaded weights cannot be dequantized; load it without disk offload first")
    dequantize(model)
    note_ties(model)
    if isinstance(dtype, str):
        # save_pretrained leaves the name of the dtype in the config, from where transformers takes it
        dtype = getattr(torch, dtype)
    return model if dtype is None else model.to(dtype)
