"""``model.dtype`` of quantized models: that of the float model, whatever parameter comes first."""

from typing import Any

import torch
import transformers

from quanto_hf.nn import QuantizedWeight


def know_dtypes() -> None:
    """Let ``PreTrainedModel.dtype`` answer for packed layers with the dtype of their weight.

    transformers takes the dtype of the first float parameter, which of a packed layer is a scale. It saves it in
    config.json, and models convert their inputs and masks to it. In the class, as its submodels are asked too.
    """
    base: Any = transformers.PreTrainedModel
    before = base.dtype
    if getattr(before.fget, "knows_quanto_hf", False):
        return

    def dtype(self: Any) -> torch.dtype:
        """`torch.dtype`: The dtype of the module (assuming that all the module parameters have the same dtype)."""
        for module in self.modules():
            if isinstance(module, QuantizedWeight) and module.is_frozen:
                return module.weight_dtype
            for parameter in module._parameters.values():
                if parameter is not None and parameter.is_floating_point():
                    found: torch.dtype = parameter.dtype
                    return found
        # for a model without float parameters
        other: torch.dtype = before.fget(self)
        return other

    dtype.knows_quanto_hf = True  # type: ignore[attr-defined]
    base.dtype = property(dtype)
