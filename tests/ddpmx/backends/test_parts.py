"""A batch in parts: each is done once, by whoever is free, and a fault in one is the batch's."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from ddpmx.backends.base import Buffers, PartBackend, SharedBackend
from ddpmx.backends.parts import Parts, Workers
from ddpmx.errors import BackendError

SHAPE = (1, 2, 2)


class Doubling:
    """out = 2·x + t + (the part's size) / 8. Shares count the calls of all."""

    description = "doubling"

    def __init__(self, calls=None, fails_at=None):
        self.calls, self.fails_at = [] if calls is None else calls, fails_at
        self.open = True

    def share(self):
        return Doubling(self.calls, self.fails_at)

    def bind(self, buffers):
        self.buffers = buffers

    def enqueue(self):
        self.calls.append((threading.current_thread(), len(self.buffers.x)))
        if self.fails_at is not None and self.buffers.x[0, 0, 0, 0] == self.fails_at:
            raise BackendError("refused")
        x, t = self.buffers.x, self.buffers.t.reshape(-1, 1, 1, 1)
        self.buffers.out[...] = 2 * x + t + len(x) / 8
        if self.buffers.var is not None:
            self.buffers.var[...] = x

    def close(self):
        self.open = False


def buffers(n, var=False):
    made = Buffers.of(n, SHAPE, var=var, conditioning_shapes={"y": (), "cond": (2, 2, 2)})
    made.x[...] = np.arange(n).reshape(-1, 1, 1, 1)
    made.t[...] = np.arange(n)
    return made


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("n", "part"), [(1, 4), (4, 4), (8, 4), (7, 3), (5, 1)])
def test_each_part_is_computed_once_and_the_last_one_filled_up(n, part, threads):
    network = Doubling()
    parts, given = Parts(network, part, threads), buffers(n, var=True)
    assert isinstance(parts, PartBackend)
    assert isinstance(parts, SharedBackend)
    parts.bind(given)
    for _ in range(2):  # the pool is used again
        given.out[...] = given.var[...] = -1
        parts.enqueue()
        np.testing.assert_array_equal(given.out[:, 0, 0, 0], 3 * np.arange(n) + part / 8)
        np.testing.assert_array_equal(given.var, given.x)
    assert len(network.calls) == 2 * -(-n // part)
    assert {size for _, size in network.calls} == {part}
    assert len({thread for thread, _ in network.calls}) <= threads
    parts.close()


def test_parts_run_at_once():
    """Neither of two parts ends before the other has begun."""
    both = threading.Barrier(2, timeout=20)

    class Meeting(Doubling):
        def share(self):
            return Meeting(self.calls)

        def enqueue(self):
            both.wait()
            super().enqueue()

    parts, given = Parts(Meeting(), 2, 2), buffers(4)
    parts.bind(given)
    parts.enqueue()
    assert parts.description == "doubling, 2 threads"
    parts.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_part_that_fails_fails_the_batch_and_no_further_one_begins(threads):
    network = Doubling(fails_at=0)
    parts = Parts(network, 1, threads)
    parts.bind(buffers(50))
    with pytest.raises(BackendError, match="refused"):
        parts.enqueue()
    assert len(network.calls) < 50
    parts.bind(buffers(1).rows(slice(0, 1)))
    with pytest.raises(BackendError, match="refused"):
        parts.enqueue()
    parts.close()


def test_an_error_in_another_thread_is_raised():
    def fails(left):
        for _ in left:
            raise BackendError("there")

    def waits(left):
        done.wait(20)

    done, workers = threading.Event(), Workers(2)
    threading.Timer(0.05, done.set).start()
    with pytest.raises(BackendError, match="there"):
        workers.run([1, 2], [waits, fails])
    workers.close()
    workers.close()


def test_threads_that_cannot_start_are_one_error(monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    parts, given = Parts(Doubling(), 1, 3), buffers(5)
    parts.bind(given)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(BackendError, match="no more threads") as caught:
            parts.enqueue()
    assert caught.value.note == "can't start new thread"
    parts.close()


def test_a_closed_one_says_so_and_shares_live_on():
    network = Doubling()
    parts = Parts(network, 2, 2)
    other = parts.share()
    parts.bind(buffers(4))
    parts.close()
    parts.close()
    assert not network.open
    with pytest.raises(BackendError, match="closed"):
        parts.bind(buffers(4))
    given = buffers(2)
    other.bind(given)
    other.enqueue()
    np.testing.assert_array_equal(given.out[:, 0, 0, 0], [0.25, 3.25])
    other.close()


def test_the_size_of_a_part_can_be_set():
    network = Doubling()
    parts, given = Parts(network, 8, 1), buffers(4)
    assert parts.largest_part == 8
    parts.use_part(2)
    parts.bind(given)
    parts.enqueue()
    assert [size for _, size in network.calls] == [2, 2]
