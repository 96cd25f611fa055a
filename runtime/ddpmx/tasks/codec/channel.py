"""A sample of N(δ, I), sent to somebody who expects N(0, I), in little more bits than the divergence of the two.

Coder and decoder have the same list of draws y_1, y_2, … of N(0, I) (:mod:`ddpmx.tasks.codec.draws`). The coder chooses one
and sends its number n: the Poisson functional representation (Li & El Gamal 2018) takes the n with the least T_n/w(y_n),
T_n being the times of a Poisson process and w(y) = exp(δ·y − |δ|²/2) the ratio of the two densities. Then y_n is exactly a
draw of N(δ, I), and log₂ n is on average hardly more than the divergence KL = |δ|²/2. A number n in [2^c, 2^(c+1)) is sent
as its class c, by odds, and c bits.

Only u = δ·y/|δ| matters: whatever chooses by u leaves everything across δ as it was drawn, so only the distribution of one
number has to be right, u ~ N(|δ|, 1).

w has no largest value, so a list of any length is too short now and then. Chance therefore decides first, by that very
distribution, where u is to be: below ``reach``, the u up to which w is at most 2^(b−1), or in one of the cells of half a
deviation above it. Then the representation is used among the draws of that cell alone. Below, the 2^(b+1) draws of a book
do. Above, sums of draws of several books are looked at too. Those are not independent of each other, which would pull u
down by a quarter of a deviation if there were no cells. With them u is where it should be, but for its place within the
cell: the mean and the deviation of u are right to within what thousands of trials show, 0.03.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ddpmx.diffusion import elementary
from ddpmx.tasks.codec.draws import ROW_BITS, Book, Place, max_class, parts
from ddpmx.tasks.codec.range_coder import Odds

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

UNIT = 8
"""Bits are planned in eighths: whole numbers, the same everywhere."""

_CELL = 0.5
"""Deviations of u."""
_BEST = 1 << 8
"""Draws of a book, and sums, that are looked at further."""
_WAITS = 1 << 12
"""Times of the process that are drawn; those after them differ too little from n."""
_PRIVATE = 1 << 21
"""The draw of the purpose that only the coder uses."""


def choose(place: Place, book: int, delta: Float64) -> tuple[int, int]:
    """The class and index of a draw from N(δ, I).

    Args:
        place: of the chunk.
        book: b, the bits of a book: how much is searched.
        delta: float64 [d].
    """
    uniform = (place.words(_WAITS + 2, _PRIVATE)[0] + 0.5) / 2.0**32
    length = float(np.sqrt(np.square(delta).sum()))
    if length < 1e-6:
        return 0, 0
    reach = ((book - 1) * math.log(2) + length**2 / 2) / length
    search = _Search(place, book, delta.astype(np.float32), -np.log(uniform[2:]))
    beyond = 0.5 * math.erfc((reach - length) * math.sqrt(0.5))
    if uniform[0] >= beyond:
        return search.run(-math.inf, reach * length)
    u = length - NormalDist().inv_cdf(max(beyond * float(uniform[1]), 1e-300))  # N(|δ|, 1), above ``reach``
    low = reach + math.floor((u - reach) / _CELL) * _CELL
    return search.run(low * length, (low + _CELL) * length)


class _Search:
    """Looks for the least T_n/w_n among draws whose δ·y is in a cell."""

    def __init__(self, place: Place, book: int, delta: Float32, waits: Float64) -> None:
        self._place, self._book, self._delta = place, book, delta
        self._times = np.cumsum(waits)
        self._best, self._found = math.inf, (0, 0)

    def run(self, low: float, high: float) -> tuple[int, int]:
        """The class and index of the draw."""
        first = Book(self._place, 0, self._book, len(self._delta)).scores(self._delta, 0, 2 << self._book)
        for number in range(self._book + 1):
            if self._begins(number) - high >= self._best:
                return self._found
            own = first[1 << number : 2 << number]
            (indices,) = np.nonzero((own > low) & (own <= high))
            if len(indices):
                values = self._log_times((1 << number) + indices) - own[indices]
                self._take(float(values.min()), number, int(indices[values.argmin()]))
        if low > -math.inf:
            self._sums(first[: 1 << self._book], low, high)
        return self._found

    def _opened(self, part: int) -> tuple[Book, Float32]:
        """A book, and the scores of its first draws."""
        book = Book(self._place, part, self._book, len(self._delta))
        return book, book.scores(self._delta, 0, min(1 << ROW_BITS, 2 << self._book))

    def _log_times(self, n: NDArray[np.int64]) -> Float64:
        """log T_n, n ≥ 1. Where there are thousands of draws before it, it is n for all that matters."""
        last = len(self._times)
        times: Float64 = np.where(n <= last, self._times[np.minimum(n, last) - 1], self._times[-1] - last + n)
        return np.log(times)

    def _begins(self, number: int) -> float:
        return float(self._log_times(np.array([1 << number]))[0])

    def _take(self, value: float, number: int, index: int) -> None:
        if value < self._best:
            self._best, self._found = value, (number, index)

    def _sums(self, first: Float32, low: float, high: float) -> None:
        """Classes above those of a book: the best sums of whole books, with the best of each class of one more."""
        book = self._book
        kept = _largest(first)
        sums, indices = first[kept].astype(np.float64), [int(i) for i in kept]
        more, begin = self._opened(1)
        pieces: list[Float32] = []
        for number in range(book + 1, max_class(book) + 1):
            if number * math.log(2) - high >= self._best:
                return
            whole, bits = parts(number, book)
            if bits == 1 and pieces:
                full = np.concatenate(pieces[:-1])  # draws 2 … 2^b − 1 of the last book
                kept = _largest(full)
                pairs = (sums[:, None] + full[kept]).ravel()
                best = _largest(pairs)
                indices = [indices[k // len(kept)] + (int(kept[k % len(kept)]) + 2 << (whole - 1) * book) for k in best]
                sums = pairs[best]
                (more, begin), pieces = self._opened(whole), []
            at = 1 << bits
            own = begin[at : 2 * at] if 2 * at <= len(begin) else more.scores(self._delta, at, 2 * at)
            pieces.append(own)
            kept = _largest(own)
            pairs = math.sqrt(book / number) * sums[:, None] + math.sqrt(bits / number) * own[kept]
            values = np.where(
                (pairs > low) & (pairs <= high), number * math.log(2) + np.log1p(kept / at) - pairs, math.inf
            )
            nothing = self._best == math.inf and number == max_class(book)  # then the one that comes nearest
            k, m = divmod(int((-pairs if nothing else values).argmin()), len(kept))
            self._take(0.0 if nothing else float(values[k, m]), number, indices[k] + (int(kept[m]) << whole * book))


def _largest(values: NDArray[np.floating]) -> NDArray[np.int64]:
    """Where the largest of them are."""
    return np.argpartition(values, max(0, len(values) - _BEST))[-_BEST:]


def class_eighths(book: int, eighths: int) -> int:
    """The class of a chunk of so many eighths of a bit, in eighths, and one more bit.

    The best of 2^b draws has a u that one of 2^b·√(4π·b·ln 2) is expected to have: with each book of a sum about 3.4 bits
    are lost.
    """
    return eighths * (UNIT * book + 27) // (UNIT * book)


def class_variance(eighths: int) -> int:
    """The variance of a class that is expected to be so many eighths, in 1/64: at least that of log₂ w, 2·bits/ln 2."""
    return 64 + 185 * eighths // 8


@lru_cache(maxsize=4096)
def class_odds(book: int, eighths: int, spread: int) -> Odds:
    """The odds of the classes of a chunk: about normal. Integers from IEEE arithmetic alone.

    Args:
        book: the bits of a book.
        eighths: the class that is expected, and one more bit, in eighths.
        spread: by how much the variance is larger than :func:`class_variance`, in eighths.
    """
    eighths = min(eighths, UNIT * max_class(book))
    apart = UNIT * (np.arange(max_class(book) + 1) + 1) - eighths
    variance = max(class_variance(eighths) * spread / UNIT, 64.0)
    shares = elementary.exp(-np.minimum(apart * apart / (2 * variance), 60.0))
    weights = 1 + np.floor(shares / shares.sum() * 60000).astype(np.int64)
    return Odds(weights.tolist())
