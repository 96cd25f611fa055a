"""What is decided before images are compressed: which states of the chain are sent, down to which t, in what groups.

A state costs KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)) = ½·(SNR_s − SNR_t)·|x_0 − x̂_0(x_t)|² where both have the variance of q
(Kingma et al. 2021, equation 13). So the error of x̂_0 by t, measured on the images themselves, says what any step costs. It
is in the file as codes, and what follows from them has the same bits on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddpmx.diffusion import elementary
from ddpmx.diffusion.schedule import Schedule
from ddpmx.errors import InputError
from ddpmx.formats import compressed
from ddpmx.tasks.codec.channel import UNIT
from ddpmx.tasks.codec.draws import LARGEST_BOOK, ROW_BITS, SMALLEST_BOOK

Float64 = NDArray[np.float64]

DEFAULT_BOOK, DEFAULT_STEPS = 16, 64
MOST_BOOKS = 8
"""That a chunk is meant to need, at most."""
_BY_CHUNK, _BY_BOOK = 3.0, 3.4
"""Bits that a chunk costs beyond its divergence, about: once, and for each book that it needs."""
_MAX_SIGNS = 1 << 24


class Forecast:
    """What images cost, as the model sees them: of the errors in a header, and the same on every machine.

    Attributes:
        schedule: of the chain.
        numbers: C·H·W.
        mse: float64 [T], the mean of (x_0 − x̂_0)² from x_t, in −1…1.
    """

    def __init__(self, schedule: Schedule, numbers: int, errors: Sequence[int]) -> None:
        self.schedule, self.numbers = schedule, numbers
        times = np.array(compressed.knots(len(schedule)))
        codes = (np.array(errors, np.float64) - compressed.CODE_OF_ONE) / compressed.CODES_PER_OCTAVE
        known = codes * math.log(2) - elementary.log(np.array([127.5]))
        at = elementary.log(np.maximum(schedule.snr, 1e-30))
        every = np.arange(len(schedule))
        k = np.clip(np.searchsorted(times, every, side="right") - 1, 0, max(len(times) - 2, 0))
        after = np.minimum(k + 1, len(times) - 1)
        apart = np.where(after > k, at[times[after]] - at[times[k]], 1.0)
        share = (at - at[times[k]]) / np.where(apart == 0, 1.0, apart)
        self.mse = elementary.exp(2 * (known[k] + share * (known[after] - known[k])))

    def bits(self, s: NDArray[np.int64] | int, t: NDArray[np.int64] | int) -> Float64:
        """Of x_s from x_t, for one image."""
        apart = self.schedule.snr[s] - self.schedule.snr[t]
        return np.asarray(apart * self.mse[t] * (0.5 * self.numbers / math.log(2)))

    @property
    def prior(self) -> float:
        """Bits that x_T knows of an image, about."""
        return float(self.schedule.snr[-1] * self.mse[-1] * (0.5 * self.numbers / math.log(2)))

    def eighths(self, times: Sequence[int]) -> list[int]:
        """Eighths of a bit for each of the states at rising timesteps, the last T − 1, of one image."""
        t = np.array(times)
        return np.floor(UNIT * np.append(self.bits(t[:-1], t[1:]), self.prior) + 0.5).astype(np.int64).tolist()  # type: ignore[no-any-return]

    def rmse(self, t: int) -> float:
        """Of x̂_0 from x_t, in levels."""
        return 127.5 * math.sqrt(self.mse[t])

    def rates(self) -> Float64:
        """Bits of x_t in steps of 1, for one image, float64 [T]."""
        every = np.arange(len(self.schedule))
        steps = self.bits(every[:-1], every[1:])
        return np.concatenate([np.cumsum(steps[::-1])[::-1], [0.0]]) + self.prior


@dataclass(frozen=True)
class Plan:
    """Which states are sent, and how.

    Attributes:
        times: their timesteps, rising.
        group: images that are coded together.
        book: bits of a book.
        chunk: bits that a chunk is meant to need.
        cost: bits of an image in the file, about.
    """

    times: tuple[int, ...]
    group: int
    book: int
    chunk: int
    cost: float


def make_plan(forecast: Forecast, stop: int, n: int, *, book: int = DEFAULT_BOOK, steps: int = DEFAULT_STEPS) -> Plan:
    """The plan down to x_t at t = ``stop`` that is expected to cost least.

    Every step costs a group of images at least as much as a chunk is meant to hold, since every chunk has a fixed cost
    beside: small images go together. Large chunks have little of that, and few images need small ones, or their steps
    would be too large.

    Args:
        forecast: of the images.
        stop: the last timestep.
        n: how many images there are.
        book: bits of a book.
        steps: about how many states are sent; of a small number a few more.
    """
    plans = [_plan(forecast, stop, n, book, steps, chunk) for chunk in range(book, (MOST_BOOKS + 1) * book, book)]
    return min(plans, key=lambda plan: plan.cost)


def _plan(forecast: Forecast, stop: int, n: int, book: int, steps: int, chunk: int) -> Plan:
    T, wanted = len(forecast.schedule), (chunk - _BY_CHUNK) / (1 + _BY_BOOK / book)
    whole = max(float(forecast.rates()[stop]), 1e-9)
    group = min(n, max(1, math.ceil(wanted * steps / whole)))
    group = min(group, max(1, (_MAX_SIGNS >> max(0, book + 1 - ROW_BITS)) // forecast.numbers))
    group = math.ceil(n / math.ceil(n / group))  # groups that are alike
    each = max(wanted / group, whole / steps)
    times, bits = [T - 1], [forecast.prior]
    while times[-1] > stop:
        t = times[-1]
        enough = np.flatnonzero(forecast.bits(np.arange(stop, t), t) >= each)
        s = stop + int(enough[-1]) if len(enough) else stop
        bits.append(float(forecast.bits(s, t)))
        times.append(s)
    chunks = [max(1, round(group * value / wanted)) if group * value > 0.25 else 0 for value in bits]
    cost = sum(bits) * (1 + _BY_BOOK / book) + _BY_CHUNK * sum(chunks) / group
    return Plan(tuple(times[::-1]), group, book, chunk, cost)


def stop_for_rate(forecast: Forecast, rate: float, n: int, *, book: int, steps: int) -> int:
    """The least t whose plan costs at most ``rate`` bits per dimension.

    Raises:
        InputError: even x_T costs more.
    """
    low, high = 0, len(forecast.schedule) - 1
    if make_plan(forecast, high, n, book=book, steps=steps).cost > rate * forecast.numbers:
        raise InputError(f"rate {rate:g} is too little for anything", hint="more bits per dimension")
    while low < high:
        middle = (low + high) // 2
        if make_plan(forecast, middle, n, book=book, steps=steps).cost <= rate * forecast.numbers:
            high = middle
        else:
            low = middle + 1
    return low


def stop_for_rmse(forecast: Forecast, rmse: float) -> int:
    """The largest t from which x̂_0 is within ``rmse`` levels.

    Raises:
        InputError: not even from t = 0.
    """
    good = np.flatnonzero(127.5 * np.sqrt(forecast.mse) <= rmse)
    if not len(good):
        raise InputError(
            f"an error of {rmse:g} levels is less than the model reaches",
            note=f"at t = 0 it is {forecast.rmse(0):.2f}",
            hint="a larger error, or a lossless file",
        )
    return int(good[-1])


def fitting_book(book: int, numbers: int) -> int:
    """The bits of a list of draws that fit into memory with images of so many numbers."""
    while book > SMALLEST_BOOK and numbers * max(1, 2 << book >> ROW_BITS) > _MAX_SIGNS:
        book -= 1
    return min(book, LARGEST_BOOK)
