"""Models of transformers are built one at a time, and tied when none is being built.

While ``from_pretrained`` builds an empty model, the default dtype of the process is that of the model, and the method
that ties weights does nothing. Two threads that do so at once put back what the other one has set: the default dtype
stays bfloat16, weights are never tied again, and models come out wrong. transformers has no lock. The hooks of our
quantizer are called before and after, so that loads of quantized models wait for each other here, for as long as an
empty model takes (milliseconds; weights are read and quantized in parallel). A float model that another thread loads
at the same time asks no quantizer, and waits for nobody.
"""

import sys
import threading
import time
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any
from weakref import ref

# After this many seconds a thread goes on although another one still builds: as slow as this is a model that waits
# for the thread itself, and to wait for each other would be forever.
LONGEST = 60.0
# Seconds from the hook before a model is built to the moment at which transformers begins, at the most. A load that
# fails tells nobody: after this time one counts only while transformers has its methods replaced, which it puts back.
# (Whether a call still runs cannot be asked of its frame: those of a running thread are not safe to walk.)
BEGINS = 5.0
# How often a thread that waits looks whether the other one has failed.
GLANCE = 0.02

# Where the from_pretrained of models is.
MODELS = "transformers.modeling_utils"

_changed = threading.Condition()
_building: "list[_Load]" = []


@dataclass(frozen=True)
class _Load:
    """A call of a thread that builds or ties a model; nested where a model loads another one while it is built."""

    thread: int
    frame: int
    code: CodeType
    # when it was begun; None for a call that says itself when it ends, failed or not
    since: float | None = None

    @property
    def is_here(self) -> bool:
        """Whether the call is one of those that this thread is in."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if id(frame) == self.frame and frame.f_code is self.code:
                return True
            frame = frame.f_back
        return False

    @property
    def builds(self) -> bool:
        """Whether a call of another thread has to be waited for."""
        return self.since is None or time.monotonic() - self.since < BEGINS or _replaced()

    def is_same(self, other: "_Load") -> bool:
        """Whether both are one call."""
        return (self.thread, self.frame, self.code) == (other.thread, other.frame, other.code)


def _replaced() -> bool:
    """Whether transformers has replaced the method that ties weights, which it does while a model is built."""
    models = sys.modules.get(MODELS)
    return getattr(getattr(models, "PreTrainedModel", None), "tie_weights", _replaced).__name__ != "tie_weights"


def begin() -> None:
    """Wait until no other thread builds a model; from here on this one does. Outside of ``from_pretrained`` nothing."""
    load = _this_load()
    if load is not None:
        _begin(load)


def end() -> bool:
    """The model is built. False where nothing was begun."""
    load = _this_load()
    return load is not None and _end(load)


def tie_alone(model: Any) -> None:
    """Have the weights of a model tied at a moment when no other thread builds one, until :func:`tie_as_ever`."""
    known = ref(model)

    def tie_weights(*args: Any, **kwargs: Any) -> Any:
        tied: Any = known()
        here = _load_of(sys._getframe(), None)
        _begin(here)
        try:
            return type(tied).tie_weights(tied, *args, **kwargs)
        finally:
            _end(here)

    # an attribute that knew the model would keep it in memory
    model.__dict__["tie_weights"] = tie_weights


def tie_as_ever(model: Any) -> None:
    """Forget :func:`tie_alone`."""
    model.__dict__.pop("tie_weights", None)


def _begin(load: _Load) -> None:
    latest = time.monotonic() + LONGEST
    with _changed:
        while _building and _building[0].thread != load.thread and _building[0].builds and time.monotonic() < latest:
            _changed.wait(GLANCE)
        # calls of this thread that have failed say nothing any more, and neither does who has built for too long
        _building[:] = [
            other for other in _building if other.thread == load.thread and not other.is_same(load) and other.is_here
        ]
        _building.append(load)


def _end(load: _Load) -> bool:
    with _changed:
        index = next((i for i, other in enumerate(_building) if other.is_same(load)), None)
        if index is None:
            return False
        del _building[index:]
        _changed.notify_all()
        return True


def _this_load() -> _Load | None:
    """The innermost call of transformers' ``from_pretrained`` in this thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "from_pretrained" and frame.f_globals.get("__name__") == MODELS:
            return _load_of(frame, time.monotonic())
        frame = frame.f_back
    return None


def _load_of(frame: FrameType, since: float | None) -> _Load:
    return _Load(threading.get_ident(), id(frame), frame.f_code, since)
