"""Brings the weights of modules to a device shortly before they are used, in the order in which they were used last."""

import copy
import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch

from quanto_hf.io.lanes import Lane, Tensors

# Modules that are on their way while one computes. Layers differ in size: with one, a small layer does not hide the
# copy of the large one that follows it.
AHEAD = 4


class Prefetcher:
    """The weights of offloaded modules on a device, each while it is used and a few before.

    Several threads may use a module at a time; its weights go when the last one has left.

    Args:
        lane: to the device.
        read: the tensors of a module, on the CPU.
        ahead: modules on their way at most.
    """

    def __init__(self, lane: Lane, read: Callable[[Hashable], Tensors], ahead: int = AHEAD) -> None:
        self.lane, self.read, self.ahead = lane, read, ahead
        self.nbytes = 0  # of all copies that were begun
        self._lock = threading.Lock()
        self._coming: dict[Hashable, Any] = {}
        self._here: dict[Hashable, tuple[Any, dict[str, torch.Tensor], int]] = {}
        self._next: dict[Hashable, Hashable] = {}
        self._last = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Prefetcher":
        # what is on its way, or here, is so for the other one
        return Prefetcher(copy.deepcopy(self.lane, memo), copy.deepcopy(self.read, memo), self.ahead)

    def enter(self, module: Hashable, put: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        """Give the weights of a module on the device to ``put``. Each call wants a :meth:`leave`."""
        with self._lock:
            previous = getattr(self._last, "module", None)
            if previous is not None:
                self._next[previous] = module
            self._last.module = module
            if module in self._here:
                ticket, tensors, users = self._here[module]
                self.lane.join(ticket)
            else:
                ticket, tensors = self._fetch(module)
                users = 0
            self._here[module] = (ticket, tensors, users + 1)
            put(tensors)
            self._start_next(module)

    def leave(self, module: Hashable, clear: Callable[[], Any]) -> None:
        """Give the weights back. ``clear`` is called if nobody uses them any more."""
        with self._lock:
            ticket, tensors, users = self._here.pop(module)
            if users > 1:
                self._here[module] = (ticket, tensors, users - 1)
            else:
                self.lane.leave()
                clear()

    def _fetch(self, module: Hashable) -> tuple[Any, dict[str, torch.Tensor]]:
        early = module in self._coming
        ticket = self._coming.pop(module) if early else self._start(module)
        try:
            return ticket, self.lane.finish(ticket)
        except torch.cuda.OutOfMemoryError:
            # device_map left room for one module at a time; what was fetched early may be too much
            if not early and not self._coming:
                raise
            self._coming.clear()
            self.ahead = max(1, self.ahead // 2)
        ticket = self._start(module)
        return ticket, self.lane.finish(ticket)

    def _start(self, module: Hashable) -> Any:
        tensors = self.read(module)
        self.nbytes += sum(tensor.nbytes for tensor in tensors.values())
        return self.lane.start(tensors)

    def _start_next(self, module: Hashable) -> None:
        wanted: list[Hashable] = []
        seen = {module}
        following = self._next.get(module)
        # several threads can leave a circle that does not lead back to this module
        while following is not None and following not in seen and len(wanted) < self.ahead:
            seen.add(following)
            if following not in self._here:
                wanted.append(following)
            following = self._next.get(following)
        # what was expected and did not come would stay for ever
        for stale in [key for key in self._coming if key not in wanted]:
            if len(self._coming) >= self.ahead:
                del self._coming[stale]
        for key in wanted:
            if key not in self._coming and len(self._coming) < self.ahead:
                try:
                    self._coming[key] = self._start(key)
                except Exception:  # it is no error of the module that has just come, and comes again with its own
                    return
