"""Ranges of images, cut so that any number of processes draws what one would.

Image i of a seed is the same whatever is drawn with it, so any cut gives the same images. These cuts fall between batches
all the same: each process then runs the very batches of the single run, and so its bits on any library and device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ddpmx.errors import InputError


@dataclass(frozen=True, order=True)
class Range:
    """The images ``first`` … ``first + count − 1``; ``count`` may be 0."""

    first: int
    count: int

    @property
    def end(self) -> int:
        """One more than the last."""
        return self.first + self.count

    def __str__(self) -> str:
        last = self.end - 1
        return (
            "no images"
            if not self.count
            else f"image{'s' * (self.count > 1)} {self.first}" + (f"…{last}" if self.count > 1 else "")
        )


@dataclass(frozen=True)
class Shard:
    """Part ``index`` of ``count``, counted from 0.

    Attributes:
        source: where the numbers are from, for people; "" if a person has said them.
    """

    index: int
    count: int
    source: str = ""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: there is no such part.
        """
        if self.count < 1 or not 0 <= self.index < self.count:
            raise InputError(
                f"there is no shard {self.index}/{self.count}",
                note=f"by {self.source}" if self.source else None,
                hint=f"--shard 0/{self.count} … --shard {self.count - 1}/{self.count}"
                if self.count > 0
                else "--shard 0/4",
            )

    def of(self, whole: Range, unit: int) -> Range:
        """This part of ``whole``: contiguous, and cut between units only.

        All parts in their order are ``whole``. They differ by one unit at most; where there are more parts than units, some
        are empty.

        Args:
            whole: what all parts draw.
            unit: images that are not torn apart, counted from the first of ``whole``: those of a batch, or of a file.
        """
        units = -(-whole.count // unit)
        begin, end = (
            min(whole.end, whole.first + unit * (units * number // self.count))
            for number in (self.index, self.index + 1)
        )
        return Range(begin, end - begin)


def cut(whole: Range, size: int) -> list[Range]:
    """``whole`` in pieces of ``size``; the last may be smaller."""
    return [Range(first, min(size, whole.end - first)) for first in range(whole.first, whole.end, size)]


def joined(ranges: Iterable[Range], most: int) -> list[Range]:
    """Neighbours made one, up to ``most`` images together.

    Args:
        ranges: in ascending order, none larger than ``most``.
        most: images of a range.
    """
    found: list[Range] = []
    for each in ranges:
        if found and found[-1].end == each.first and found[-1].count + each.count <= most:
            found[-1] = Range(found[-1].first, found[-1].count + each.count)
        else:
            found.append(each)
    return found
