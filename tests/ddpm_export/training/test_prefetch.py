"""Batches that are read ahead are those that would have been read without it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: the training side (no torch)")

from ddpm_export.training.prefetch import Prefetch

ORDER = [np.array([step, step + 1]) for step in range(7)]


def threads() -> int:
    return sum(thread.name.startswith("prefetch") for thread in threading.enumerate())


@pytest.mark.parametrize("depth", [1, 2, 20])
def test_order_and_content_are_those_of_reading_one_by_one(depth):
    batches = list(Prefetch(lambda indices: indices * 10, ORDER, depth))
    assert np.array_equal(batches, np.array(ORDER) * 10)
    assert threads() == 0


def test_batches_are_read_ahead_but_no_more_than_asked_for():
    taken: list[int] = []
    asked = itertools.count()
    read = threading.Semaphore(0)

    def take(indices: np.ndarray) -> int:
        taken.append(int(indices[0]))
        read.release()
        return int(indices[0])

    with Prefetch(take, (np.array([number]) for number in asked), depth=2) as batches:
        assert next(batches) == 0
        for _ in range(3):
            assert read.acquire(timeout=10)
        assert taken == [0, 1, 2], "two ahead, without being asked for"
        assert next(asked) == 3
        assert not read.acquire(timeout=0.02)
    assert threads() == 0


def test_an_error_is_raised_where_its_batch_is_asked_for():
    def take(indices: np.ndarray) -> int:
        if indices[0] == 2:
            raise OSError("image 2")
        return int(indices[0])

    batches = Prefetch(take, ORDER, depth=5)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(OSError, match="image 2"):
        next(batches)
    assert threads() == 0
    assert list(batches) == []


def test_an_error_of_the_order_is_raised_where_its_batch_is_asked_for():
    def order() -> Iterator[np.ndarray]:
        yield ORDER[0]
        raise KeyError("epoch")

    batches = Prefetch(lambda indices: indices, order(), depth=3)
    assert next(batches).tolist() == [0, 1]
    with pytest.raises(KeyError):
        next(batches)
    assert threads() == 0


def test_it_stops_in_the_middle():
    with Prefetch(lambda indices: indices, itertools.cycle(ORDER)) as batches:
        next(batches)
        assert threads() == 1  # control
    assert threads() == 0
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)
    with pytest.raises(ValueError, match="depth"):
        Prefetch(lambda indices: indices, ORDER, 0)
