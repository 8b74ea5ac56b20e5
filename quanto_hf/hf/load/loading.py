"""The loading operation that turns a float checkpoint tensor into quantized ones."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps

from quanto_hf.hf.load.names import slot_at, stored_name
from quanto_hf.hf.load.pieces import Pieces
from quanto_hf.hf.load.ties import arrives
from quanto_hf.nn import QuantizedWeight
from quanto_hf.nn.slots import Slot
from quanto_hf.ops.scratch import give_back

# Rows over which the error of a parameter is measured.
MEASURED = 64


class Later(Protocol):
    """What may want a tensor to be made later (:class:`quanto_hf.hf.offload.deferred.Deferred`)."""

    def takes(self, model: nn.Module, first: str, name: str, piece: torch.Tensor) -> bool:
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
            names = [name]
            if self.later is not None and waiting is not None and not isinstance(value, Pieces):
                # what is made now is checked where it is quantized
                _check_shape(waiting[1], value if isinstance(value, list) else [value], name)
            if self.later is not None and self.later.takes(model, full_layer_name, name, _first(value)):
                if waiting is not None:
                    layer, slot = waiting
                    layer._parameters.pop(slot.name, None)
                    names += [stored_name(slot, name, part) for part in layer.tensors(slot.name)]
            elif waiting is not None:
                for part, tensor in quantize_into(waiting[0], value, name).items():
                    result[stored_name(waiting[1], name, part)] = tensor
            else:
                result[name] = value
                continue
            names += arrives(model, name)
            if missing_keys is not None:
                missing_keys.difference_update(names)
        return result


def quantize_into(
    layer: QuantizedWeight, weight: torch.Tensor | list[torch.Tensor] | Pieces, name: str
) -> dict[str, torch.Tensor]:
    """The stored tensors of a float parameter, by the names of the scheme; the layer gives up its placeholder.

    Args:
        layer: gets the error of the slot.
        weight: the parameter, or pieces of it along its first dimension. A list is emptied. Stacked experts are
            quantized one after the other, however they come.
        name: of the parameter: its last part is the name of the slot, and it is named in errors.

    Raises:
        ValueError: the weight has the wrong shape, or NaN or infinite values.
    """
    slot = layer.slot(name.rpartition(".")[2])
    scheme, fit = layer.scheme_of(slot), layer.fit_of(slot)
    whole, errors, done = dict[str, torch.Tensor](), list[tuple[int, float]](), 0
    for piece in _pieces(slot, scheme.by_rows and slot.rows_first, weight, name):
        view, count = slot.of(tuple(piece.shape)), len(piece)
        if piece.shape[1:] != slot.shape[1:] or done + count > slot.shape[0]:
            raise _wrong_shape(slot, f"those of pieces, the last one {tuple(piece.shape)}", name)
        matrix = view.to_matrix(piece)
        try:
            made = scheme.quantize(matrix, fit)
        except ValueError as reason:
            raise ValueError(f"{name}: {reason}") from None
        most = max(4, MEASURED * count // max(1, slot.shape[0]))
        if (error := layer.measure_error(matrix, made, slot, most)) is not None:
            errors.append((matrix.shape[:-1].numel(), error))
        if count == slot.shape[0]:
            whole = made
        else:
            for part, tensor in made.items():
                if part not in whole:
                    # not torch.cat in the end, which would hold all of them twice
                    whole[part] = tensor.new_empty((slot.shape[0] * len(tensor) // count, *tensor.shape[1:]))
                at = done * len(tensor) // count
                whole[part][at : at + len(tensor)] = tensor
        done += count
        # before the next one is read
        del piece, matrix, made
    if done != slot.shape[0]:
        raise _wrong_shape(slot, f"pieces for {done} of {slot.shape[0]}", name)
    if isinstance(weight, Pieces):
        give_back()
    # pieces of one weight have rows of about one size
    count = sum(rows for rows, _ in errors)
    layer.slot_errors[slot.name] = (sum(rows * e**2 for rows, e in errors) / count) ** 0.5 if count else None
    layer._parameters.pop(slot.name, None)
    return whole


def _pieces(
    slot: Slot, each: bool, weight: torch.Tensor | list[torch.Tensor] | Pieces, name: str
) -> Iterator[torch.Tensor]:
    """What is quantized at a time.

    Args:
        each: whether pieces of the parameter can be quantized each on its own.
    """
    if isinstance(weight, Pieces):
        found = weight if each else [torch.cat(list(weight))]
        yield from found
        return
    pieces = weight if isinstance(weight, list) else [weight]
    _check_shape(slot, pieces, name)
    if not each and len(pieces) > 1:
        pieces[:] = [torch.cat(pieces)]
    while pieces:
        piece = pieces.pop(0)
        yield from torch.split(piece, 1) if each and slot.leading and len(piece) else [piece]
        del piece


def _first(value: Any) -> torch.Tensor:
    """The tensor, or the first of its pieces."""
    first: torch.Tensor = value.first() if isinstance(value, Pieces) else value[0] if isinstance(value, list) else value
    return first


def _check_shape(slot: Slot, pieces: list[torch.Tensor], name: str) -> None:
    """Raise ValueError for pieces that do not make up the parameter."""
    found = [tuple(piece.shape) for piece in pieces]
    if not slot.pieces(found):
        raise _wrong_shape(
            slot, found[0] if len(found) == 1 else f"those of pieces, {', '.join(map(str, found))}", name
        )


def _wrong_shape(slot: Slot, found: Any, name: str) -> ValueError:
    return ValueError(f"{name} has shape {found} in the checkpoint, but the model needs {slot.shape}")
