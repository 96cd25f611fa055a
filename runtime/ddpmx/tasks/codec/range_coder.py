"""A range coder: whole numbers with known odds as bytes, by integers alone, so that every machine agrees in every bit.

Martin (1979), with the carry held back as in LZMA. Odds are whole numbers whose sum is at most 2¹⁶, and cost at most
0.01 % through rounding. A coder in plain Python, because nothing in a file needs many symbols, and because no kept library
of its kind can be installed everywhere that the rest runs (constriction has no wheels for Linux on aarch64).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from ddpmx.errors import FileFormatError

MAX_TOTAL = 1 << 16
_TOP, _WORD = 1 << 24, (1 << 32) - 1
_RAW = 16
_ZEROS = 8
"""Bytes 0 at the end that are left out, at most: a reader takes more than these for numbers that nobody has written."""


class Odds:
    """A distribution over 0…k−1: whole numbers, at least 1 each, with a sum of at most :data:`MAX_TOTAL`."""

    def __init__(self, weights: Sequence[int]) -> None:
        self.starts = [0, *accumulate(weights)]
        self.total = self.starts[-1]
        if min(weights, default=0) < 1 or self.total > MAX_TOTAL:
            raise ValueError("odds must be at least 1 each, and 65536 together")

    def bits(self, symbol: int) -> float:
        """What a symbol costs."""
        return math.log2(self.total / (self.starts[symbol + 1] - self.starts[symbol]))


class Writer:
    """Symbols in, bytes out."""

    def __init__(self) -> None:
        self._low, self._range = 0, _WORD
        self._held, self._carried = 0, 1  # the byte that a carry can still change, and how many follow it as 0xFF
        self._bytes = bytearray()

    def __len__(self) -> int:
        """About how many bytes there would be, were it finished now."""
        return len(self._bytes) + self._carried + 1

    def put(self, symbol: int, odds: Odds) -> None:
        """Append a symbol."""
        self._put(odds.starts[symbol], odds.starts[symbol + 1] - odds.starts[symbol], odds.total)

    def put_bits(self, value: int, count: int) -> None:
        """Append a number of ``count`` bits, each value as likely as the others."""
        for at in range(0, count, _RAW):
            size = min(_RAW, count - at)
            self._put(value >> at & (1 << size) - 1, 1, 1 << size)

    def _put(self, start: int, size: int, total: int) -> None:
        part = self._range // total
        self._low += start * part
        self._range = size * part
        while self._range < _TOP:
            self._range <<= 8
            self._shift()

    def _shift(self) -> None:
        if self._low < 0xFF000000 or self._low > _WORD:
            carry = self._low >> 32
            while self._carried:
                self._bytes.append(self._held + carry & 0xFF)
                self._held = 0xFF
                self._carried -= 1
            self._held = self._low >> 24 & 0xFF
        self._carried += 1
        self._low = self._low << 8 & _WORD

    def finish(self) -> bytes:
        """All of it, without up to :data:`_ZEROS` zeros at its end, which the reader puts there again."""
        for zeros in range(32, -1, -8):  # the number in the range that has the most of them
            rounded = self._low + (1 << zeros) - 1 >> zeros << zeros
            if rounded < self._low + self._range:
                self._low = rounded
                break
        for _ in range(5):
            self._shift()
        data = bytes(self._bytes[1:])  # the first byte is the one before any carry: 0
        return data[: max(len(data.rstrip(b"\0")), len(data) - _ZEROS)]


class Reader:
    """Bytes in, symbols out. Behind the end come zeros; too many of them, and the bytes are no writer's."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at, self._range, self._code = data, 0, _WORD, 0
        for _ in range(4):
            self._next()

    def _next(self) -> None:
        byte = self._data[self._at] if self._at < len(self._data) else 0
        self._code = self._code << 8 & _WORD | byte
        self._at += 1

    def get(self, odds: Odds) -> int:
        """The next symbol.

        Raises:
            FileFormatError: there is none.
        """
        part, target = self._target(odds.total)
        symbol = bisect_right(odds.starts, target) - 1
        self._take(odds.starts[symbol], odds.starts[symbol + 1] - odds.starts[symbol], part)
        return symbol

    def get_bits(self, count: int) -> int:
        """The next number of ``count`` bits.

        Raises:
            FileFormatError: there is none.
        """
        value = 0
        for at in range(0, count, _RAW):
            size = min(_RAW, count - at)
            part, target = self._target(1 << size)
            self._take(target, 1, part)
            value |= target << at
        return value

    def _target(self, total: int) -> tuple[int, int]:
        part = self._range // total
        target = self._code // part
        if target >= total or self._at > len(self._data) + _ZEROS:
            raise FileFormatError("the compressed numbers end too early, or are damaged")
        return part, target

    def _take(self, start: int, size: int, part: int) -> None:
        self._code -= start * part
        self._range = size * part
        while self._range < _TOP:
            self._range <<= 8
            self._next()
