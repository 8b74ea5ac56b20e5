"""The way to a CUDA device, with stand-ins for streams and events: what is copied, in which order, and what is waited
for. The device is the CPU."""

import threading
from contextlib import nullcontext

import pytest
import torch

from quanto_hf.io import lanes
from quanto_hf.io.lanes import ALIGNMENT, CudaLane, fill, layout


class Event:
    """Knows when it was recorded and waited for."""

    log: list[tuple[str, "Event"]]

    def __init__(self, blocking=False):
        self.stream = None

    def record(self, stream):
        self.stream = stream
        Event.log.append(("record", self))

    def synchronize(self):
        assert self.stream is not None
        Event.log.append(("synchronize", self))


class Stream:
    """Notes the events that it waits for."""

    def __init__(self, device=None):
        self.waited = []

    def wait_event(self, event):
        assert event.stream is not None
        self.waited.append(event)


@pytest.fixture
def cuda(monkeypatch):
    """CUDA's names that the lane uses; the current stream of a thread is its own."""
    Event.log = []
    streams = {}
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: streams.setdefault(threading.get_ident(), Stream())
    )
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: False)
    recorded = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: recorded.append((self, stream)))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **k: empty(*size, **k))
    monkeypatch.setattr(lanes, "CHUNK", 1000)
    return recorded


def some(seed=0):
    """Tensors of several dtypes, one larger than three buffers, one without elements, one that is not contiguous."""
    torch.manual_seed(seed)
    return {
        "weight_packed": torch.randint(0, 255, (61, 53), dtype=torch.uint8),
        "weight_scale": torch.randn(61, 2).bfloat16(),
        "nothing": torch.empty(0, 4),
        "bias": torch.randn(61),
        "one": torch.tensor(2.5),
        "turned": torch.randn(7, 5).t(),
    }


def the_same(copies, tensors):
    assert list(copies) == list(tensors)
    return all(
        copies[name].dtype == t.dtype and copies[name].shape == t.shape and torch.equal(copies[name], t)
        for name, t in tensors.items()
    )


@pytest.mark.parametrize("chunk", [1, 100, 256, 4096, 10**6])
def test_a_block_is_filled_part_by_part(chunk):
    tensors = some()
    places, size = layout(tensors)
    assert size % ALIGNMENT == 0 and all(begin % ALIGNMENT == 0 for begin in places.values())
    block = torch.zeros(size, dtype=torch.uint8)
    for low in range(0, size, chunk):
        fill(block[low : low + chunk], low, tensors, places)
    for name, tensor in tensors.items():
        data = block[places[name] : places[name] + tensor.nbytes]
        assert torch.equal(data, tensor.contiguous().view(-1).view(torch.uint8))


def test_the_copies_are_the_tensors_and_the_current_stream_waits_for_them(cuda):
    lane = CudaLane(torch.device("cpu"))
    for seed in range(3):
        tensors = some(seed)
        copies = lane.finish(lane.start(tensors))
        assert the_same(copies, tensors)
        assert not {t.data_ptr() for t in copies.values() if t.numel()} & {t.data_ptr() for t in tensors.values()}
    current = torch.cuda.current_stream(None)
    assert len(current.waited) == 3 and all(event.stream is lane.stream for event in current.waited)
    assert len(cuda) == 3 * len(tensors) and {stream for _, stream in cuda} == {current}


def test_a_pinned_buffer_is_filled_again_when_its_copy_is_done(cuda):
    lane = CudaLane(torch.device("cpu"))
    lane.finish(lane.start(some()))
    # all but the last event, which is that of the whole copy, are those of a part
    parts = [event for what, event in Event.log if what == "record"][:-1]
    assert len(parts) > 4
    waited = [event for what, event in Event.log if what == "synchronize"]
    assert waited == parts[:-2]
    for event in waited:
        begun = Event.log.index(("synchronize", event))
        assert sum(what == "record" for what, _ in Event.log[:begun]) == parts.index(event) + 2


def test_another_thread_waits_with_its_own_stream(cuda):
    lane = CudaLane(torch.device("cpu"))
    ticket = lane.start(some())
    copies = lane.finish(ticket)
    cuda.clear()
    thread = threading.Thread(target=lane.join, args=(ticket,))
    thread.start()
    thread.join()
    (stream,) = {stream for _, stream in cuda}
    assert stream is not torch.cuda.current_stream(None) and len(stream.waited) == 1
    assert len(cuda) == len(copies)


def test_a_copy_waits_until_the_device_is_near(cuda):
    lane = CudaLane(torch.device("cpu"))
    current = torch.cuda.current_stream(None)
    for _ in range(5):
        lane.finish(lane.start(some()))
        lane.leave()
    left = [event for what, event in Event.log if what == "record" and event.stream is current]
    waited = [event for what, event in Event.log if what == "synchronize" and event.stream is current]
    # the fifth copy began when three modules were left
    assert len(left) == 5 and waited == left[: 4 - lanes.BEHIND]


def test_an_error_is_raised_by_finish_and_takes_no_buffer_away(cuda, monkeypatch):
    lane = CudaLane(torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(lanes, "fill", lambda *args: 1 / 0)
        for _ in range(5):
            with pytest.raises(ZeroDivisionError):
                lane.finish(lane.start(some()))
    assert len(lane._buffers) == lanes.BUFFERS
    assert the_same(lane.finish(lane.start(some())), some())


def test_what_is_pinned_is_copied_from_where_it_is(cuda, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    monkeypatch.setattr(lanes, "fill", lambda *args: 1 / 0)
    lane = CudaLane(torch.device("cpu"))
    assert the_same(lane.finish(lane.start(some())), some())
