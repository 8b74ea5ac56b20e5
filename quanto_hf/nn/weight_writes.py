"""Writes into the weight of a frozen layer: a power of two goes into its scales, anything else is refused."""

import math
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

if TYPE_CHECKING:
    from quanto_hf.nn.qweight import QuantizedWeight


def write_weight(layer: "QuantizedWeight", name: str, operation: str, value: Any) -> None:
    """Let a layer hold a written weight in a packed slot. RWKV divides weights by powers of two when it goes to eval
    mode, and multiplies them when it goes back; other models clip what is within the limits already.

    Only what can be stored exactly is: the weight as it is, or times a power of two, which the stored scales are
    multiplied with. That loses nothing, so that the opposite factor leads back to the same bits.

    Args:
        layer: FROZEN.
        name: of the slot.
        operation: what wrote, for the error.
        value: what the whole weight is to be.

    Raises:
        RuntimeError: the value cannot be stored exactly. The layer is as it was.
    """
    slot, stored, before = layer.slot(name), layer.tensors(name), layer.dequantized(name)
    scheme = layer.scheme_of(slot)
    if not isinstance(value, torch.Tensor) or value.shape != before.shape or before.device.type == "meta":
        refuse_write(layer, operation)
    value = value.detach().to(before.device, before.dtype)
    if torch.equal(value, before):
        return
    factor = _power_of_two(value, before)
    scaled = None if factor is None else scheme.scaled(stored, factor)
    if factor is None or scaled is None:
        refuse_write(layer, operation)
    made = slot.from_matrix(scheme.dequantize({**stored, **scaled}, slot.matrix_shape[-1], before.dtype))
    # numbers below the smallest normal one are rounded to a grid of their own, scales are not
    slack = torch.finfo(before.dtype).smallest_normal * torch.finfo(before.dtype).eps * max(1.0, factor)
    if not bool(((made - value).abs() <= slack).all()):
        refuse_write(layer, operation)
    # a new tensor behind the same parameter: the old one may be a page of a file, or part of a state dict
    for name, tensor in scaled.items():
        with torch.inference_mode(stored[name].is_inference()):
            stored[name].data = tensor.clone()


def _power_of_two(value: torch.Tensor, before: torch.Tensor) -> float | None:
    """The factor between two tensors, by their largest elements, if it is a power of two."""
    at = before.abs().argmax() if before.numel() else None
    if at is None or not before.view(-1)[at]:
        return None
    factor = float(value.reshape(-1)[at]) / float(before.view(-1)[at])
    return factor if 0 < factor < math.inf and math.frexp(factor)[0] == 0.5 else None


def refuse_write(layer: nn.Module, operation: str) -> NoReturn:
    """Raise the error of what would change the weight of a layer that holds it quantized.

    Args:
        layer: the layer.
        operation: what tried to.

    Raises:
        RuntimeError: always.
    """
    name = getattr(layer, "quantized_as", "")
    where, pattern = (f"{name}: ", f"[{name!r}]") if name else ("", "[...]")
    raise RuntimeError(
        f"{where}{operation} writes, but the weight of a frozen {type(layer).__name__} cannot be written: it is held "
        "quantized, and only a power of two times the weight is stored exactly. Where the code of the model writes, "
        f"leave the layer in float: modules_to_not_convert={pattern}. Replace the layer by an nn.Linear, or dequantize "
        "the model first (quanto_hf.dequantize(model), or model.dequantize()): adapters can be merged then"
    )
