"""How the weights of one module get from the CPU to a device: in one piece, if possible while the device computes."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch

Tensors = Mapping[str, torch.Tensor]

# Tensors lie at multiples of this in a buffer: the widest loads of GPU kernels.
ALIGNMENT = 256


class Lane(Protocol):
    """A way to a device."""

    def start(self, tensors: Tensors) -> Any:
        """Begin to copy; returns a ticket at once."""

    def finish(self, ticket: Any) -> dict[str, torch.Tensor]:
        """The copies, ready for what the calling thread computes next."""


class PlainLane:
    """Copies when the copy is wanted: for devices without streams."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self, tensors: Tensors) -> Tensors:
        """Nothing yet."""
        return tensors

    def finish(self, ticket: Tensors) -> dict[str, torch.Tensor]:
        """The copies; always new memory, also on the CPU."""
        return {name: tensor.to(self.device, copy=True) for name, tensor in ticket.items()}


class CudaLane:
    """Copies on a stream of its own, through pinned memory, while the device computes.

    A thread reads the tensors (from a file, if they are mapped) into a pinned buffer, and one copy takes the buffer to
    the device. What is pinned already is copied from where it is.

    Args:
        device: a CUDA device.
        buffers: pinned buffers; one more than modules that are on their way.
    """

    def __init__(self, device: torch.device, buffers: int) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="quanto_hf-offload")
        self._buffers: list[tuple[torch.Tensor | None, Any]] = [(None, None)] * buffers

    def start(self, tensors: Tensors) -> Future[Any]:
        """Begin to read and to copy."""
        return self._pool.submit(self._copy, tensors)

    def finish(self, ticket: Future[Any]) -> dict[str, torch.Tensor]:
        """The copies. The current stream of this thread waits for them; the thread does not."""
        copies, event = ticket.result()
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        for tensor in copies.values():
            # its memory was taken on the other stream, and must not be reused there before this one is done with it
            tensor.record_stream(current)
        return dict(copies)

    def _copy(self, tensors: Tensors) -> tuple[dict[str, torch.Tensor], Any]:
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            if all(tensor.is_pinned() for tensor in tensors.values()):
                copies = {name: tensor.to(self.device, non_blocking=True) for name, tensor in tensors.items()}
            else:
                copies = self._staged(tensors)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self.stream)
        return copies, event

    def _staged(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        places, end = {}, 0
        for name, tensor in tensors.items():
            places[name] = end
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        buffer, copied = self._buffers.pop(0)
        if copied is not None:
            copied.synchronize()
        if buffer is None or buffer.numel() < end:
            buffer = torch.empty(end, dtype=torch.uint8, pin_memory=True)
        for name, tensor in tensors.items():
            part = buffer[places[name] : places[name] + tensor.nbytes]
            part.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        there = torch.empty(end, dtype=torch.uint8, device=self.device)
        there.copy_(buffer[:end], non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(self.stream)
        self._buffers.append((buffer, copied))
        return {
            name: there[places[name] : places[name] + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for name, tensor in tensors.items()
        }


def lane_to(device: torch.device, ahead: int) -> Lane:
    """The best way to a device for ``ahead`` modules on their way at a time."""
    return CudaLane(device, ahead + 1) if device.type == "cuda" else PlainLane(device)
