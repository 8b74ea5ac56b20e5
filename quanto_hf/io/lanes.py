"""How the weights of one module get from the CPU to a device: in one piece, if possible while the device computes."""

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import torch

Tensors = Mapping[str, torch.Tensor]

# Tensors lie at multiples of this on the device: the widest loads of GPU kernels.
ALIGNMENT = 256
# Of one pinned buffer. The larger a copy the nearer it comes to the speed of the bus, which 16 MB reach; the buffers of
# whole modules would be as large as the largest one, an embedding of some GB.
CHUNK = 1 << 25
# One is filled while the other one is copied.
BUFFERS = 2
# Modules that the device has yet to compute with when the next copy begins. Kernels wait in a queue: without an end of
# it, a long prompt would bring a whole model to the device before the first layer is done.
BEHIND = 2


class Lane(Protocol):
    """A way to a device."""

    def start(self, tensors: Tensors) -> Any:
        """Begin to copy; returns a ticket at once."""

    def finish(self, ticket: Any) -> dict[str, torch.Tensor]:
        """The copies, ready for what the calling thread computes next."""

    def join(self, ticket: Any) -> None:
        """Make copies that another thread has finished ready for what the calling thread computes next."""

    def leave(self) -> None:
        """What the calling thread has begun to compute is the last thing that needs the weights of a module."""


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

    def join(self, ticket: Tensors) -> None:
        """They are ready."""

    def leave(self) -> None:
        """Nothing waits."""


class CudaLane:
    """Copies on a stream of its own, through pinned memory, while the device computes.

    A thread reads the tensors (from a file, if they are mapped) into one of two pinned buffers, part by part, and each
    part is copied to the device while the other buffer is filled. What is pinned already is copied from where it is.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="quanto_hf-offload")
        # a buffer, and the event after which it may be filled again
        self._buffers: deque[tuple[torch.Tensor | None, Any]] = deque([(None, None)] * BUFFERS)
        self._left: deque[Any] = deque()

    def __deepcopy__(self, memo: Any) -> "CudaLane":
        # a stream and buffers of its own
        return CudaLane(self.device)

    def start(self, tensors: Tensors) -> Future[Any]:
        """Begin to read and to copy."""
        return self._pool.submit(self._copy, tensors)

    def finish(self, ticket: Future[Any]) -> dict[str, torch.Tensor]:
        """The copies. The current stream of this thread waits for them; the thread does not."""
        copies, _ = ticket.result()
        self.join(ticket)
        return dict(copies)

    def join(self, ticket: Future[Any]) -> None:
        """The current stream of this thread waits for the copies too: it may be another one."""
        copies, event = ticket.result()
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        for tensor in copies.values():
            # its memory was taken on the other stream, and must not be reused there before this one is done with it
            tensor.record_stream(current)

    def leave(self) -> None:
        """Note where the current stream of this thread is."""
        with torch.cuda.device(self.device):
            # blocking: a thread that waits for it sleeps
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.device))
        self._left.append(event)

    def _copy(self, tensors: Tensors) -> tuple[dict[str, torch.Tensor], Any]:
        while len(self._left) > BEHIND:
            self._left.popleft().synchronize()
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            if all(tensor.is_pinned() for tensor in tensors.values()):
                copies = {name: tensor.to(self.device, non_blocking=True) for name, tensor in tensors.items()}
            else:
                copies = self._staged(tensors)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self.stream)
        return copies, event

    def _staged(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        places, size = layout(tensors)
        there = torch.empty(size, dtype=torch.uint8, device=self.device)
        for low in range(0, size, CHUNK):
            part = there[low : low + CHUNK]
            with self._buffer() as buffer:
                fill(buffer, low, tensors, places)
                part.copy_(buffer[: len(part)], non_blocking=True)
        return {
            name: there[begin : begin + tensors[name].nbytes].view(tensors[name].dtype).view(tensors[name].shape)
            for name, begin in places.items()
        }

    @contextmanager
    def _buffer(self) -> Iterator[torch.Tensor]:
        """The buffer that was used longest ago. It comes back after an error too, or none would be left."""
        buffer, copied = self._buffers.popleft()
        try:
            if copied is not None:
                copied.synchronize()
            if buffer is None:
                buffer = torch.empty(CHUNK, dtype=torch.uint8, device="cpu", pin_memory=True)
            yield buffer
            copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            copied.record(self.stream)
        finally:
            self._buffers.append((buffer, copied))


def layout(tensors: Tensors) -> tuple[dict[str, int], int]:
    """Where each tensor begins in one block of memory, and the bytes of the block."""
    places, end = dict[str, int](), 0
    for name, tensor in tensors.items():
        places[name] = end
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return places, end


def fill(buffer: torch.Tensor, low: int, tensors: Tensors, places: Mapping[str, int]) -> None:
    """Copy the part of a block that begins at ``low`` and is as long as ``buffer`` into it.

    Args:
        buffer: bytes.
        tensors: on the CPU.
        places: of :func:`layout`.
    """
    high = low + len(buffer)
    for name, begin in places.items():
        first, last = max(low, begin), min(high, begin + tensors[name].nbytes)
        if first < last:
            data = tensors[name].detach().contiguous().view(-1).view(torch.uint8)
            buffer[first - low : last - low].copy_(data[first - begin : last - begin])


def lane_to(device: torch.device) -> Lane:
    """The best way to a device."""
    return CudaLane(device) if device.type == "cuda" else PlainLane(device)
