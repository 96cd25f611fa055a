"""Ranges and workers that die."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpmx.errors import BackendError
from ddpmx.scale.ranges import Range, cut
from ddpmx.scale.tasks import MOST_LOSSES, Tasks


@given(st.data(), st.integers(1, 12), st.integers(1, 5))
def test_every_range_is_drawn_whoever_dies(data, count, workers):
    ranges, deaths = cut(Range(0, 8 * count), 8), MOST_LOSSES - 1
    tasks, idle, busy, drawn = Tasks(ranges), list(range(workers)), [], []
    while not tasks.finished:
        while idle and (images := tasks.take(idle[-1])) is not None:
            busy.append((idle.pop(), images))
        worker, images = busy.pop(data.draw(st.integers(0, len(busy) - 1)))
        if deaths and data.draw(st.booleans()):
            deaths -= 1
            tasks.lose(worker, "killed")
        else:
            assert tasks.done(worker) == images
            drawn.append(images)
        idle.append(worker)
    assert sorted(drawn) == ranges
    assert (tasks.drawn, tasks.images, tasks.waiting) == (8 * count, 8 * count, 0)


def test_a_range_that_kills_its_workers_ends_the_run():
    tasks = Tasks([Range(0, 8)])
    for _ in range(MOST_LOSSES - 1):
        tasks.take("a")
        tasks.lose("a", "killed")
    assert tasks.take("a") == Range(0, 8)
    with pytest.raises(BackendError, match=r"(?s)images 0…7: lost with their worker 3 times.*by the OOM killer"):
        tasks.lose("a", "by the OOM killer")


def test_workers_that_never_begin_end_the_run():
    tasks = Tasks([Range(0, 8)])
    for _ in range(MOST_LOSSES):
        tasks.lose("nobody", "no memory for the model")
    with pytest.raises(BackendError, match="workers have died in a row"):
        tasks.lose("nobody", "no memory for the model")
