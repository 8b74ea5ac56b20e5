"""What a model is called with: one batch or many, moved to where the model takes its inputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import nn


def batches(data: Any) -> Iterator[Any]:
    """The batches of ``data``, one after another.

    Args:
        data: a tensor, a tuple (positional arguments) or a mapping (keyword arguments) is one batch. Any other
            iterable, such as a list or a DataLoader, has batches as its items, and so has what ``Tensor.split`` gives:
            a tuple, but of views of one tensor.

    Raises:
        TypeError: it is none of these.

    Example:
        >>> len(list(batches({"input_ids": torch.ones(1, 2)}))), len(list(batches([torch.ones(1), torch.ones(1)])))
        (1, 2)
    """
    if _is_one(data):
        yield data
    elif isinstance(data, Iterable) and not isinstance(data, str | bytes):
        yield from data
    else:
        raise TypeError(
            f"a batch is a tensor, a tuple or a dict, and several are a list or loader; {data!r} is neither"
        )


def count_of(data: Any) -> int | None:
    """How many batches that are, or None: it cannot be known."""
    if _is_one(data):
        return 1
    return len(data) if isinstance(data, Sized) else None


def _is_one(data: Any) -> bool:
    if isinstance(data, tuple) and len(data) > 1 and all(isinstance(item, torch.Tensor) for item in data):
        # pieces of a split would go to the model as arguments: the second one as the attention mask, without a word
        storages = {item.untyped_storage().data_ptr() for item in data}
        # the same tensor twice, and tensors without data, are no pieces
        pieces = len({item.data_ptr() for item in data}) == len(data)
        return len(storages) > 1 or not pieces
    return isinstance(data, torch.Tensor | tuple | Mapping)


def call(model: nn.Module, batch: Any) -> Any:
    """``model(**batch)``, ``model(*batch)`` or ``model(batch)``, with tensors moved to the device of the model."""
    batch = moved(batch, device_of(model))
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def run_all(model: nn.Module, each: Iterable[Any]) -> None:
    """Call a model with every batch, without gradients and in evaluation mode; the modes of its modules come back.

    Args:
        model: on any device.
        each: what :func:`batches` gives.

    Raises:
        ValueError: there is no batch.
    """
    count, training = 0, {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            for batch in each:
                call(model, batch)
                count += 1
    finally:
        for module, mode in training.items():
            module.training = mode
    if not count:
        raise ValueError("there is no batch to calibrate with: the data is empty, or an ended iterator")


def device_of(module: nn.Module) -> torch.device | None:
    """The device of the first parameter that has data; None if there is none, as where all weights are offloaded."""
    return next((p.device for p in module.parameters() if p.device.type != "meta"), None)


def mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same nest of mappings, lists and tuples with its tensors changed. Everything else stays what it is."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: mapped(item, change) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(mapped(item, change) for item in value)
    return value


def moved(value: Any, device: torch.device | None) -> Any:
    """The same with tensors on ``device``; None leaves them where they are."""
    return value if device is None else mapped(value, lambda tensor: tensor.to(device))


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The floating-point tensors in a nest of mappings (outputs of transformers are some), dataclasses, lists and
    tuples.

    Example:
        >>> [tuple(t.shape) for t in tensors_of({"logits": torch.ones(2, 3), "more": (torch.ones(1), None, 7)})]
        [(2, 3), (1,)]
    """
    plain = (tensor.dequantize() if tensor.is_quantized else tensor for tensor in every_tensor(value))
    return [tensor for tensor in plain if tensor.is_floating_point()]


def every_tensor(value: Any) -> list[torch.Tensor]:
    """The tensors of every dtype in such a nest."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif is_dataclass(value) and not isinstance(value, type):
        value = list(vars(value).values())
    return [tensor for item in value for tensor in every_tensor(item)] if isinstance(value, list | tuple) else []
