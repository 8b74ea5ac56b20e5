"""The loading operation that turns a float checkpoint tensor into quantized ones."""

from typing import Any, Protocol

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps

from quanto_hf.hf.load.names import slot_at, stored_name
from quanto_hf.hf.load.ties import arrives
from quanto_hf.nn import QuantizedWeight
from quanto_hf.nn.slots import Slot


class Later(Protocol):
    """What may want a tensor to be made later (:class:`quanto_hf.hf.offload.deferred.Deferred`)."""

    def takes(self, model: nn.Module, first: str, name: str, pieces: list[torch.Tensor]) -> bool:
        """Whether it takes this one, which is one of those that the loader makes together with ``first``."""


class QuantizeWeights(ConversionOps):  # type: ignore[misc]
    """Quantizes a float weight as it arrives from the checkpoint. It holds no model: the loader copies it often.

    Args:
        later: takes tensors that are not made now, or None.
    """

    def __init__(self, later: Later | None = None) -> None:
        self.later = later

    def convert(
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        missing_keys: set[str] | None = None,
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Names of float tensors -> names of stored tensors; what is not to be quantized passes through.

        Raises:
            ValueError: a tensor has the wrong shape, or NaN or infinite values.
        """
        assert model is not None
        result: dict[str, Any] = {}
        for name, value in input_dict.items():
            # also one whose placeholder is gone, because what it is tied to has arrived
            waiting = slot_at(model, name)
            pieces, names = value if isinstance(value, list) else [value], [name]
            if waiting is not None:
                _check_shape(waiting[1], pieces, name)
            if self.later is not None and self.later.takes(model, full_layer_name, name, pieces):
                if waiting is not None:
                    layer, slot = waiting
                    layer._parameters.pop(slot.name, None)
                    names += [stored_name(slot, name, part) for part in layer.tensors(slot.name)]
            elif waiting is not None:
                for part, tensor in quantize_into(waiting[0], pieces, name).items():
                    result[stored_name(waiting[1], name, part)] = tensor
            else:
                result[name] = value
                continue
            names += arrives(model, name)
            if missing_keys is not None:
                missing_keys.difference_update(names)
        return result


def quantize_into(
    layer: QuantizedWeight, weight: torch.Tensor | list[torch.Tensor], name: str
) -> dict[str, torch.Tensor]:
    """The stored tensors of a float parameter, by the names of the scheme; the layer gives up its placeholder.

    Args:
        layer: gets the error of the slot.
        weight: the parameter, or pieces of it along its first dimension. A list is emptied.
        name: of the parameter: its last part is the name of the slot, and it is named in errors.

    Raises:
        ValueError: the weight has the wrong shape, or NaN or infinite values.
    """
    slot = layer.slot(name.rpartition(".")[2])
    scheme, fit = layer.scheme_of(slot), layer.fit_of(slot)
    pieces = weight if isinstance(weight, list) else [weight]
    views = _check_shape(slot, pieces, name)
    if len(pieces) > 1 and not (scheme.by_rows and slot.rows_first):
        pieces[:], views = [torch.cat(pieces)], [slot]
    stored, errors = list[dict[str, torch.Tensor]](), list[tuple[int, float]]()
    for view in views:
        piece = view.to_matrix(pieces.pop(0))
        try:
            stored.append(scheme.quantize(piece, fit))
        except ValueError as reason:
            raise ValueError(f"{name}: {reason}") from None
        error = layer.measure_error(piece, stored[-1], slot)
        if error is not None:
            errors.append((piece.shape[:-1].numel(), error))
        # before the next one is read
        del piece
    # pieces of one weight have rows of about one size
    count = sum(rows for rows, _ in errors)
    layer.slot_errors[slot.name] = (sum(rows * e**2 for rows, e in errors) / count) ** 0.5 if count else None
    layer._parameters.pop(slot.name, None)
    return stored[0] if len(stored) == 1 else {part: torch.cat([s[part] for s in stored]) for part in stored[0]}


def _check_shape(slot: Slot, pieces: list[torch.Tensor], name: str) -> list[Slot]:
    """The slots of the pieces."""
    found = [tuple(piece.shape) for piece in pieces]
    if made := slot.pieces(found):
        return made
    shapes = found[0] if len(found) == 1 else f"those of pieces, {', '.join(map(str, found))}"
    raise ValueError(f"{name} has shape {shapes} in the checkpoint, but the model needs {slot.shape}")
