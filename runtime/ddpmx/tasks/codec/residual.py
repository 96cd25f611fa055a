"""What is left of images once a decoder has an estimate of them: every level, exactly, on every machine.

The estimate x̂_0 is another one in its last bits on another machine, and odds that depend on it would then be others. So
it is rounded to levels first, and for each run of :data:`RUN` numbers the coder says by which of eight offsets: by one at
which none of them is nearer to where rounding changes than :data:`MARGIN`. Everything else that the odds depend on is whole
numbers that have been decoded before. If the estimates differ by more than the margin, the checksum of the pixels says so.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from ddpmx.diffusion import elementary
from ddpmx.tasks.codec.range_coder import Odds, Reader, Writer

UInt8 = NDArray[np.uint8]

RUN, OFFSETS, MARGIN = 16, 8, 0.02
"""Numbers with one offset, offsets, and levels of an estimate by which machines may differ."""

_SCALES = 44
"""Scales of the residuals, from an eighth of a level on, four to an octave."""
_CONTEXTS = 24
"""How large the residuals around are, and whether the expected level is 0 or 255."""


def write(writer: Writer, pixels: UInt8, estimate: NDArray[np.float32]) -> None:
    """Append the levels of images.

    Args:
        writer: of the numbers.
        pixels: uint8 [n, C, H, W].
        estimate: float32 [n, C, H, W], x̂_0 in −1…1.
    """
    values = _levels(estimate)
    offsets = np.array([_offset(run) for run in _runs(values.reshape(len(values), -1))])
    model = _Adaptive(OFFSETS)
    for offset in offsets.tolist():
        writer.put(offset, model.odds())
        model.count(offset)
    levels = pixels.ravel().tolist()

    def code(at: int, odds: Odds) -> int:
        writer.put(levels[at], odds)
        return levels[at]

    _Levels(_rounded(values, offsets)).run(code, np.empty(values.shape, np.uint8))


def read(reader: Reader, estimate: NDArray[np.float32]) -> UInt8:
    """The levels of images, uint8 [n, C, H, W].

    Raises:
        FileFormatError: there are not so many.
    """
    values, model = _levels(estimate), _Adaptive(OFFSETS)
    offsets = []
    for _ in range(len(values) * -(-values[0].size // RUN)):
        offset = reader.get(model.odds())
        model.count(offset)
        offsets.append(offset)
    pixels = np.zeros(values.shape, np.uint8)
    _Levels(_rounded(values, np.array(offsets))).run(lambda _, odds: reader.get(odds), pixels)
    return pixels


def _levels(estimate: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.clip(estimate.astype(np.float64) * 127.5 + 127.5, 0, 255)


def _runs(values: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    for image in values:
        for at in range(0, len(image), RUN):
            yield image[at : at + RUN]


def _offset(run: NDArray[np.float64]) -> int:
    """The first offset at which no value is near a change; if there is none, that where they are farthest from it."""
    shifted = run[:, None] + 0.5 + np.arange(OFFSETS) / OFFSETS
    apart = np.abs(shifted - np.round(shifted)).min(axis=0)
    enough = apart >= MARGIN
    return int(enough.argmax() if enough.any() else apart.argmax())


def _rounded(values: NDArray[np.float64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Levels as whole numbers, int64 of the shape of ``values``."""
    flat = values.reshape(len(values), -1)
    each = np.repeat(offsets.reshape(len(values), -1), RUN, axis=1)[:, : flat.shape[1]]
    rounded = np.clip(np.floor(flat + 0.5 + each / OFFSETS), 0, 255).astype(np.int64)
    return rounded.reshape(values.shape)


class _Adaptive:
    """Odds that follow how often each symbol came."""

    def __init__(self, symbols: int) -> None:
        self._counts = [4] * symbols

    def odds(self) -> Odds:
        """As of now."""
        return Odds(self._counts)

    def count(self, symbol: int) -> None:
        """It came again."""
        self._counts[symbol] += 8
        if sum(self._counts) > 1 << 12:
            self._counts = [(count + 1) // 2 for count in self._counts]


class _Scale:
    """The scale of the residuals in a context, from those that were there before: whole numbers."""

    def __init__(self, begin: int) -> None:
        self._sum, self._count = 4 * begin, 4

    def add(self, size: int) -> None:
        """|residual| in 1/16 levels."""
        self._sum += size
        self._count += 1
        if self._count > 256:
            self._sum, self._count = self._sum // 2, self._count // 2

    @property
    def code(self) -> int:
        """Of the mean |residual|, 0…:data:`_SCALES` − 1: rising steps of a quarter of an octave, in whole numbers."""
        return min(bisect_right(_STEPS, self._sum // self._count), _SCALES - 1)


_STEPS = [2 * (1 << k // 4) * (16, 19, 23, 27)[k % 4] // 16 for k in range(_SCALES)]


@cache
def _shares(code: int) -> NDArray[np.int64]:
    """Of residuals −255…255 at a scale: a Laplace and a wider one, in whole numbers by IEEE arithmetic alone."""
    scale = _STEPS[code] / 16 * 0.85
    sizes = np.abs(np.arange(-255, 256)).astype(np.float64)

    def laplace(width: float) -> NDArray[np.float64]:
        shares = elementary.exp(-np.minimum(sizes / width, 80.0))
        return np.asarray(shares / shares.sum())

    mixed = 0.85 * laplace(max(scale, 0.12)) + 0.15 * laplace(3 * scale + 1.0)
    return np.floor(mixed * (1 << 30)).astype(np.int64)


@lru_cache(maxsize=4096)
def _odds(code: int, level: int) -> Odds:
    """Of the 256 levels where ``level`` is expected: what lies outside is left out."""
    shares = _shares(code)[255 - level : 511 - level]
    return Odds((1 + shares * 60000 // int(shares.sum())).tolist())


class _Levels:
    """Levels in the order of their rows, with the odds of each."""

    def __init__(self, expected: NDArray[np.int64]) -> None:
        self._expected = expected
        self._scales = [_Scale(16 + 4 * context * context) for context in range(_CONTEXTS)]

    def run(self, code: Callable[[int, Odds], int], pixels: UInt8) -> None:
        """Code every level, and keep what ``code`` (place, odds) gives for it in ``pixels``."""
        n, _, height, width = self._expected.shape
        flat = pixels.reshape(n, -1)
        for image in range(n):
            levels = self._expected[image].ravel().tolist()
            sizes = [0] * len(levels)  # |residual|
            plane = height * width
            for at, level in enumerate(levels):
                row, column = at % plane // width, at % width
                left = sizes[at - 1] if column else 0
                up = sizes[at - width] if row else left
                corner = sizes[at - width + 1] if row and column + 1 < width else up
                before = sizes[at - plane] if at >= plane else up
                seen = 2 * left + 2 * up + corner + before
                edge = 0 < level < 255
                context = min(seen.bit_length() + (seen >> max(seen.bit_length() - 2, 0) & 1), 11) + 12 * edge
                scale = self._scales[context]
                found = code(image * len(levels) + at, _odds(scale.code, level))
                flat[image, at] = found
                sizes[at] = size = abs(found - level)
                scale.add(16 * size)
