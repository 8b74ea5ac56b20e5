"""Float tensors of a loaded model get memory of their own, in the place of pages of mapped files."""

from typing import Any

import torch
from torch import nn

from quanto_hf.io import aligned
from quanto_hf.nn import QuantizedWeight


def own_floats(model: Any, every: bool) -> None:
    """Copy floats out of the mapped files. (Weights that go to disk are on meta, and are mapped later.)

    Args:
        every: of a float checkpoint, which would stay mapped as a whole for the sake of some norms. Of a quantized one
            only those that do not begin at a cache line, whose products would have other last bits.
    """
    modules = list(model.modules())
    layers = [module for module in modules if isinstance(module, QuantizedWeight)]
    stored = {id(layer._parameters.get(name)) for layer in layers for name in layer.stored_names}
    # the former ones too, so that no other tensor gets the number of one that is gone
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    # tensors of inference mode, in which the caller may be, cannot be trained later
    with torch.inference_mode(False):
        for module in modules:
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.device.type == "cpu" and id(tensor) not in stored:
                        if id(tensor) not in made:
                            made[id(tensor)] = tensor, _owned(tensor, every)
                        tensors[name] = made[id(tensor)][1]


def _owned(tensor: torch.Tensor, always: bool) -> torch.Tensor:
    """The tensor with memory of its own; a new one in the place of one that was made in inference mode.

    Args:
        always: False copies only what does not begin at a cache line.
    """
    data = tensor.data
    if not tensor.is_inference():
        tensor.data = data.clone() if always else aligned(data)
        return tensor
    return nn.Parameter(data.clone(), tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data.clone()
