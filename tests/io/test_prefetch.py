"""The prefetcher has the weights of a module ready when it is used again, and never more than it may."""

import threading
import weakref

import pytest
import torch

from quanto_hf.io.lanes import PlainLane
from quanto_hf.io.prefetch import Prefetcher

MODULES = {name: {"weight": torch.full((4,), float(i))} for i, name in enumerate("abcdefg")}


class Lane(PlainLane):
    """Notes what is begun, and in which order it is wanted."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.started, self.finished = [], []

    def start(self, tensors):
        self.started.append(int(tensors["weight"][0]))
        return super().start(tensors)

    def finish(self, ticket):
        self.finished.append(int(ticket["weight"][0]))
        return super().finish(ticket)


def run(prefetcher: Prefetcher, order: str) -> list[float]:
    got: list[float] = []
    for name in order:
        prefetcher.enter(name, lambda tensors: got.append(float(tensors["weight"][0])))
        prefetcher.leave(name, lambda: None)
    return got


@pytest.fixture
def lane():
    return Lane()


def test_each_module_gets_its_own_weights(lane):
    prefetcher = Prefetcher(lane, MODULES.__getitem__, ahead=2)
    for _ in range(3):
        assert run(prefetcher, "abcdefg") == [0, 1, 2, 3, 4, 5, 6]


def test_from_the_second_pass_on_the_next_modules_are_on_their_way(lane):
    prefetcher = Prefetcher(lane, MODULES.__getitem__, ahead=2)
    run(prefetcher, "abcdefg")
    run(prefetcher, "a")
    assert lane.started[-2:] == [1, 2] and lane.finished[-1] == 0


@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_no_more_than_the_allowed_modules_are_on_their_way(lane, ahead):
    prefetcher = Prefetcher(lane, MODULES.__getitem__, ahead=ahead)
    for order in ("abcdefg", "abcdefg", "gfedcba", "acegbdf", "abcdefg", "aaab", "abcdefg"):
        for name in order:
            run(prefetcher, name)
            assert len(prefetcher._coming) <= ahead
    assert not prefetcher._here


def test_in_a_steady_order_each_weight_is_copied_once_per_pass(lane):
    prefetcher = Prefetcher(lane, MODULES.__getitem__, ahead=2)
    run(prefetcher, "abcdefg" * 2)
    before = prefetcher.nbytes
    run(prefetcher, "abcdefg" * 5)
    assert prefetcher.nbytes - before == 5 * 7 * 16


def test_a_module_that_two_use_goes_when_the_second_one_leaves(lane):
    prefetcher, cleared = Prefetcher(lane, MODULES.__getitem__), []
    for _ in range(2):
        prefetcher.enter("a", lambda tensors: None)
    prefetcher.leave("a", lambda: cleared.append(1))
    assert not cleared
    prefetcher.leave("a", lambda: cleared.append(2))
    assert cleared == [2] and lane.finished == [0]


def test_several_threads_get_what_they_ask_for(lane):
    prefetcher, wrong = Prefetcher(lane, MODULES.__getitem__, ahead=2), []

    def work(order: str) -> None:
        for _ in range(50):
            if run(prefetcher, order) != [float("abcdefg".index(name)) for name in order]:
                wrong.append(order)

    threads = [threading.Thread(target=work, args=(order,)) for order in ("abcdefg", "gfedcba", "acegbdf", "ab")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not prefetcher._here and len(prefetcher._coming) <= 2


def test_a_circle_of_modules_that_are_in_use_comes_to_an_end(lane):
    prefetcher = Prefetcher(lane, MODULES.__getitem__)
    run(prefetcher, "cababab")
    for name in "ab":
        prefetcher.enter(name, lambda tensors: None)
    prefetcher._last.module = None
    assert run(prefetcher, "c") == [2]


class Ticket(dict):
    """Counts while somebody holds it."""

    __hash__ = object.__hash__


class SmallLane(Lane):
    """A way to a device that has room for some modules."""

    def __init__(self, room):
        super().__init__()
        self.room, self.tickets = room, weakref.WeakSet()

    def start(self, tensors):
        ticket = Ticket(super().start(tensors))
        self.tickets.add(ticket)
        return ticket

    def finish(self, ticket):
        if len(self.tickets) > self.room:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return super().finish(ticket)


@pytest.mark.parametrize("room", [1, 2, 3, 9])
def test_where_memory_is_short_less_is_fetched_early(room):
    lane = SmallLane(room)
    prefetcher = Prefetcher(lane, MODULES.__getitem__)
    for _ in range(4):
        assert run(prefetcher, "abcdefg") == [0, 1, 2, 3, 4, 5, 6]
    assert prefetcher.ahead == {1: 1, 2: 2, 3: 2, 9: 4}[room]


def test_a_module_that_does_not_fit_alone_is_an_error_and_changes_nothing():
    lane = SmallLane(0)
    prefetcher = Prefetcher(lane, MODULES.__getitem__)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run(prefetcher, "a")
    assert not prefetcher._here and not lane.tickets and prefetcher.ahead == 4


def test_an_error_of_a_module_that_is_fetched_early_is_raised_when_it_is_wanted(lane):
    broken = []

    def read(name):
        if name in broken:
            raise OSError(name)
        return MODULES[name]

    prefetcher = Prefetcher(lane, read)
    run(prefetcher, "abcdefg")
    broken.append("b")
    assert run(prefetcher, "a") == [0]
    with pytest.raises(OSError, match="b"):
        run(prefetcher, "b")
    assert not prefetcher._here
    broken.clear()
    assert run(prefetcher, "abcdefg") == [0, 1, 2, 3, 4, 5, 6]


def test_each_further_user_joins_and_the_last_one_leaves():
    class Noted(Lane):
        def __init__(self):
            super().__init__()
            self.calls = []

        def join(self, ticket):
            self.calls.append("join")

        def leave(self):
            self.calls.append("leave")

    prefetcher = Prefetcher(Noted(), MODULES.__getitem__)
    for _ in range(3):
        prefetcher.enter("a", lambda tensors: None)
    for _ in range(3):
        prefetcher.leave("a", lambda: None)
    assert prefetcher.lane.calls == ["join", "join", "leave"]
