"""What coder and decoder do alike: they walk down the same chain, and cut its states into the same chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.diffusion.schedule import respace
from ddpmx.errors import Cancelled
from ddpmx.formats.compressed import Header
from ddpmx.pipeline import Pipeline
from ddpmx.tasks.codec import channel, draws
from ddpmx.tasks.codec.channel import UNIT
from ddpmx.tasks.codec.draws import Place
from ddpmx.tasks.codec.plan import Forecast
from ddpmx.tasks.codec.range_coder import Odds

Float32 = NDArray[np.float32]


class Network:
    """x̂_0 from states at one t."""

    def __init__(
        self, pipeline: Pipeline, labels: list[int] | None, batch: int, cancel: Callable[[], bool] | None
    ) -> None:
        self._pipeline, self._labels, self._batch, self._cancel = pipeline, labels, batch, cancel
        self.schedule = pipeline.spec.make_schedule()

    def __call__(self, x: Float32, t: int, previous: Float32 | None = None) -> Float32:
        """float32 [n, C, H, W], of states of the first n images."""
        if self._cancel is not None and self._cancel():
            raise Cancelled("cancelled before the last state")
        more: dict[str, Any] = {}
        if self._pipeline.spec.self_condition and previous is not None:
            more["x0_prev"] = previous
        labels = None if self._labels is None else self._labels[: len(x)]
        return self._pipeline.evaluate(x, t, labels=labels, batch=self._batch, **more).x0


class Walk:
    """The states of all images, and the coefficients of the steps between them."""

    def __init__(self, header: Header, pipeline: Pipeline) -> None:
        schedule = respace(pipeline.spec.make_schedule(), np.array(header.times))
        self._x0, self._xt = schedule.posterior_mean_coef_x0, schedule.posterior_mean_coef_xt
        self._sigma = np.sqrt(schedule.posterior_variance)
        self._first = math.sqrt(schedule.alpha_bar[-1]), math.sqrt(schedule.one_minus_alpha_bar[-1])
        self._header = header
        self.x: Float32 = np.zeros((header.n, *header.shape), np.float32)
        self.previous: Float32 | None = None

    def estimated(self, x0: Float32) -> None:
        """Take x̂_0 from the state where it is."""
        self.previous = x0

    def signal(self, i: int) -> float:
        """By how many deviations of q an x_0 of 1 more moves the mean of state i."""
        if self.previous is None:
            return self._first[0] / self._first[1]
        return float(self._x0[i + 1] / self._sigma[i + 1])

    def move(self, i: int, y: Float32) -> None:
        """To state i, by y: N(0, I), or rather what the coder has made of it."""
        if self.previous is None:
            self.x = np.float32(self._first[1]) * y
            return
        of_x0, of_xt, sigma = (np.float32(values[i + 1]) for values in (self._x0, self._xt, self._sigma))
        self.x = of_x0 * self.previous + of_xt * self.x + sigma * y


class Chunks:
    """How the states are cut into chunks, and what those are expected to need: whole numbers on both sides.

    What has been sent so far corrects the forecast: the classes of a unit's chunks by how many bits they need, and those of
    all chunks by how far they are from what was expected.
    """

    def __init__(self, header: Header, forecast: Forecast) -> None:
        self._header, self._bits = header, forecast.eighths(header.times)
        self.units = [slice(at, min(at + header.group, header.n)) for at in range(0, header.n, header.group)]
        begin = UNIT * max(24, header.chunk)  # as if one chunk had been as expected
        self._needed, self._planned = [begin] * len(self.units), [begin] * len(self.units)
        self._apart = 12 * channel.class_variance(begin)  # as if eight were one and a half times as far apart as log₂ w
        self._expected = 8 * channel.class_variance(begin)

    def of(self, i: int) -> Iterator[tuple[int, slice, NDArray[np.int64], Place, int]]:
        """Of each unit the chunks of state i: unit, images, which numbers of theirs, place, expected eighths of a bit.

        A chunk that is not worth sending has −1 for the last.
        """
        header, t = self._header, self._header.times[i]
        whole = UNIT * header.chunk
        for unit, group in enumerate(self.units):
            n = group.stop - group.start
            planned = channel.class_eighths(header.book, self._bits[i] * n)
            expected = planned * self._needed[unit] // self._planned[unit]
            size = n * header.numbers
            if expected < 2:
                yield unit, group, np.arange(size), Place(header.seed, unit, t, 0), -1
                continue
            count = min(max(1, (2 * expected + whole) // (2 * whole)), draws.MAX_CHUNKS - 1, size)
            order = draws.order(Place(header.seed, unit, t, draws.MAX_CHUNKS - 1), size)
            self._planned[unit] += planned
            for chunk in range(count):
                numbers = order[size * chunk // count : size * (chunk + 1) // count]
                yield unit, group, numbers, Place(header.seed, unit, t, chunk), expected // count

    def odds(self, expected: int) -> Odds:
        """Of the class of a chunk."""
        return channel.class_odds(self._header.book, expected, UNIT * self._apart // self._expected)

    def learn(self, unit: int, expected: int, number: int) -> None:
        """A chunk of a unit was of this class."""
        found = UNIT * (number + 1)
        self._needed[unit] += found
        self._apart += (found - expected) ** 2
        self._expected += channel.class_variance(expected)
