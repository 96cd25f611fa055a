"""The draws of N(0, I) that coder and decoder have in common: an endless list of them for every chunk.

*The list is a book.* Row r of a table that never changes, with signs by chance for each chunk, is a draw; 2^b scores are a
product of matrices then.

*Above 2^(b+1), draws are sums.* The others of the list are sums of a draw of each of several books, and a good sum is found
without a list of all sums. A sum of draws with the weights √(bits of each / bits of all) is a draw itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ddpmx.diffusion import noise
from ddpmx.diffusion.noise import Purpose

Float32 = NDArray[np.float32]

ROW_BITS, WIDTH = 12, 256
"""The table: 2¹² rows of 256 numbers."""

SMALLEST_BOOK, LARGEST_BOOK = 8, 22
"""b: a book has 2^(b+1) draws."""

MAX_BOOKS = 24
"""Of a sum."""

MAX_CHUNKS = 1 << 12
"""Of a step."""

_ROWS = 1 << ROW_BITS
_TABLE, _ORDER = 1 << 20, 1 << 22
"""Draws of the purpose that are no signs."""


@dataclass(frozen=True)
class Place:
    """Where a chunk is; its list of draws belongs to it alone.

    Attributes:
        seed: of the file.
        unit: the number of the unit, the images that are coded together.
        t: the timestep that is coded.
        chunk: its number in the step.
    """

    seed: int
    unit: int
    t: int
    chunk: int

    def words(self, count: int, repeat: int, variations: range = range(1)) -> NDArray[np.uint32]:
        """uint32 [variations, count]."""
        steps = (self.t << LARGEST_BOOK + 1 - ROW_BITS) + np.arange(variations.start, variations.stop)
        return noise.words(
            self.seed, [self.unit * MAX_CHUNKS + self.chunk], steps, Purpose.CODEC, count, repeat=repeat
        )[:, 0]


def max_class(book: int) -> int:
    """The largest class: of the draws 2^class … 2^(class+1) − 1 of the list."""
    return MAX_BOOKS * book


@cache
def _table() -> Float32:
    return noise.normal(0, range(_ROWS), 0, Purpose.CODEC, WIDTH, repeat=_TABLE)


def order(place: Place, count: int) -> NDArray[np.int64]:
    """The order of a unit's numbers in which they are cut into chunks, so that all chunks are alike: int64 [count]."""
    return np.argsort(place.words(count, _ORDER)[0], kind="stable")


class Book:
    """2^(b+1) draws of N(0, I_d), of a place: rows of the table, turned by signs.

    Args:
        place: of the chunk.
        part: which of its books.
        book: b.
        d: numbers of a draw.
        only: the one draw that is asked for: less is made ready then.
    """

    def __init__(self, place: Place, part: int, book: int, d: int, *, only: int | None = None) -> None:
        self._d, self._segments = d, -(-d // WIDTH)
        count = self._segments * WIDTH // 32
        self._first = 0 if only is None else only >> ROW_BITS  # the one row of 2¹² that a decoder needs
        end = max(1, 2 << book >> ROW_BITS) if only is None else self._first + 1
        words = place.words(count + self._segments, part, range(self._first, end))
        bits = words[:, :count, None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)
        self._signs = 1 - 2 * bits.reshape(len(words), -1).astype(np.float32)
        self._begin = (words[:, count:] & np.uint32(_ROWS - 1)).astype(np.int64)

    def scores(self, delta: Float32, first: int, last: int) -> Float32:
        """δ·y of the draws ``first`` … ``last`` − 1, float32. The whole table is multiplied, 2¹² draws, for any of them."""
        wide, table = np.zeros(self._segments * WIDTH, np.float32), _table()
        wide[: self._d] = delta
        part = slice(first >> ROW_BITS, -(-last >> ROW_BITS))
        turned, begin = self._signs[part] * wide, self._begin[part]
        total = np.zeros((len(turned), _ROWS), np.float32)
        for segment in range(self._segments):
            products = turned[:, segment * WIDTH : (segment + 1) * WIDTH] @ table.T
            for v, at in enumerate(begin[:, segment].tolist()):
                total[v, : _ROWS - at] += products[v, at:]
                total[v, _ROWS - at :] += products[v, :at]
        return total.reshape(-1)[first - part.start * _ROWS : last - part.start * _ROWS]

    def draw(self, index: int) -> Float32:
        """Draw number ``index``, float32 [d]."""
        v = (index >> ROW_BITS) - self._first
        drawn: Float32 = (self._signs[v] * _table()[(index + self._begin[v]) % _ROWS].reshape(-1))[: self._d]
        return drawn


def parts(number: int, book: int) -> tuple[int, int]:
    """What a draw of class ``number`` is a sum of: draws of so many whole books, and of so many bits of one more."""
    whole = max(0, number - 1) // book
    return whole, number - whole * book


def draw(place: Place, book: int, number: int, index: int, d: int) -> Float32:
    """The draw that the decoder looks up.

    Args:
        place: of the chunk.
        book: b, the bits of a book.
        number: its class, 0…:func:`max_class`.
        index: 0…2^class − 1.
        d: numbers in the chunk.

    Returns:
        float32 [d].
    """
    whole, last = parts(number, book)
    total = np.zeros(d, np.float32)
    for part in range(whole + 1):
        bits = book if part < whole else last
        own = index & (1 << bits) - 1
        index >>= bits
        own += (1 << bits) * (part == whole)  # the last one is a class of its book, the others the first 2^b
        factor = np.float32(math.sqrt(bits / number) if whole else 1.0)
        total += factor * Book(place, part, book, d, only=own).draw(own)
    return total
