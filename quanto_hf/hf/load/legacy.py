"""Hooks that transformers 4 had and 5 has not, for code that was written against them."""

from typing import Any

import torch

from quanto_hf.hf.load.names import waiting_slot
from quanto_hf.nn import QuantizedWeight
from quanto_hf.schemes import Grouped


class LegacyHooks:
    """The old names. Each does its job on the same modules; transformers 5 calls none of them."""

    quantization_config: Any

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """float32 unless a dtype is given."""
        return torch.float32 if torch_dtype is None else torch_dtype

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Without the stored tensors of quantized layers, which a float checkpoint does not have."""
        quantized = {
            f"{name}.{stored}"
            for name, module in model.named_modules()
            if isinstance(module, QuantizedWeight)
            for stored in module.stored_names
        }
        return [key for key in missing_keys if not {key, f"{prefix}.{key}", key.removeprefix(f"{prefix}.")} & quantized]

    def check_quantized_param(
        self, model: Any, param_value: Any, param_name: str, state_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> bool:
        """Whether :meth:`create_quantized_param` is to be called for this parameter."""
        return waiting_slot(model, param_name) is not None

    def create_quantized_param(
        self, model: Any, param_value: torch.Tensor, param_name: str, target_device: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Put a float weight into its layer, and freeze the layer.

        Raises:
            ValueError: the parameter is not the float weight of a quantized layer.
        """
        from accelerate.utils import set_module_tensor_to_device

        if (found := waiting_slot(model, param_name)) is None:
            raise ValueError(f"{param_name} is not the float weight of a quantized layer")
        set_module_tensor_to_device(model, param_name, target_device, param_value)
        layer, slot = found
        layer.freeze_slot(slot)

    def adjust_target_dtype(self, target_dtype: torch.dtype) -> Any:
        """The dtype with the size of a weight, as accelerate counts it for a device map."""
        from accelerate.utils import CustomDtype

        scheme = self.quantization_config.choice().scheme()
        if not isinstance(scheme, Grouped):
            # 2 bits per weight are the largest of what accelerate counts that is not above most layouts
            return CustomDtype.INT2
        kind = scheme.type
        if kind.bits == 8:
            return torch.int8 if kind.kind == "int" else CustomDtype.FP8
        return CustomDtype.INT4 if kind.bits > 2 else CustomDtype.INT2
