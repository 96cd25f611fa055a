"""The next batches are read in a thread while the present one is computed with."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

_T = TypeVar("_T")


class Prefetch(Generic[_T]):
    """An iterator over batches that are read ahead, in their order.

    What a batch holds depends on its indices alone, so that reading ahead changes nothing about a run, nor about how it is
    resumed. ``order`` is asked in the thread that iterates, and only for as many batches as are read ahead.

    Args:
        take: the indices of a batch → the batch. Called in one thread, for one batch after another.
        order: the indices of the batches; it may have no end.
        depth: batches that are ready or being read besides the one that was given out last, at least 1.

    Raises:
        Exception: what ``take`` or ``order`` raises, where the batch is asked for. That ends the iteration.
    """

    def __init__(
        self, take: Callable[[NDArray[np.int64]], _T], order: Iterable[NDArray[np.int64]], depth: int = 2
    ) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, not {depth}")
        self._take, self._order, self._depth = take, iter(order), depth
        self._begun: deque[Future[_T]] = deque()
        self._pool = ThreadPoolExecutor(1, "prefetch")
        self._ended = False

    def __iter__(self) -> Iterator[_T]:
        return self

    def __next__(self) -> _T:
        self._begin()
        if not self._begun:
            self.close()
            raise StopIteration
        try:
            batch = self._begun.popleft().result()
        except BaseException:  # Ctrl-C as well
            self.close()
            raise
        self._begin()
        return batch

    def __enter__(self) -> Prefetch[_T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the iteration. A batch that is being read is waited for; no other is begun."""
        self._ended = True
        self._begun.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self) -> None:
        """Have as many batches read ahead as there may be."""
        while not self._ended and len(self._begun) < self._depth:
            try:
                self._begun.append(self._pool.submit(self._take, next(self._order)))
            except StopIteration:
                self._ended = True
            except Exception as error:  # of the order: raised where its batch is asked for
                self._ended = True
                failed: Future[_T] = Future()
                failed.set_exception(error)
                self._begun.append(failed)
