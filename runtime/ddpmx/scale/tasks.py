"""Which range is with which worker, and what becomes of it when the worker dies. Knows nothing of how they are started."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterable

from ddpmx.errors import BackendError
from ddpmx.scale.ranges import Range

MOST_LOSSES = 3
"""A range whose workers die this often would take every worker down, one after the other."""


class Tasks:
    """Ranges to be drawn by workers that may die.

    Args:
        ranges: what is to be drawn.
        most_losses: how often a range may be lost with its worker, and workers may die in a row without having drawn any.
    """

    def __init__(self, ranges: Iterable[Range], most_losses: int = MOST_LOSSES) -> None:
        self._waiting, self._with = deque(ranges), dict[Hashable, Range]()
        self.images = sum(each.count for each in self._waiting)
        """In all ranges."""
        self._losses: Counter[Range] = Counter()
        self._most, self._in_a_row = most_losses, 0
        self.drawn = self.lost = 0
        """Images drawn, and workers lost."""

    @property
    def waiting(self) -> int:
        """Ranges that are with nobody."""
        return len(self._waiting)

    @property
    def finished(self) -> bool:
        """Whether every range was drawn."""
        return not self._waiting and not self._with

    def take(self, worker: Hashable) -> Range | None:
        """The next range, which this worker draws from now on; None if there is none."""
        if not self._waiting:
            return None
        self._with[worker] = self._waiting.popleft()
        return self._with[worker]

    def done(self, worker: Hashable) -> Range:
        """The range that this worker has drawn."""
        images = self._with.pop(worker)
        self.drawn += images.count
        self._in_a_row = 0
        return images

    def lose(self, worker: Hashable, why: str) -> None:
        """A worker has died: its range is the next to be drawn.

        Raises:
            BackendError: that has happened too often.
        """
        images = self._with.pop(worker, None)
        self.lost += 1
        self._in_a_row += 1
        if images is not None:
            self._waiting.appendleft(images)
            self._losses[images] += 1
        if images is not None and self._losses[images] >= self._most:
            raise BackendError(
                f"{images}: lost with their worker {self._losses[images]} times",
                note=why,
                hint="is there enough memory? A smaller --batch or fewer --workers take less",
            )
        if self._in_a_row > self._most * (1 + len(self._with)):
            raise BackendError(
                f"{self._in_a_row} workers have died in a row", note=why, hint="ddpmx generate without --ray"
            )
