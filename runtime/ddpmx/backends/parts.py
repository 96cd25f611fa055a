"""Cuts a batch into parts for the cores: each part is computed by one thread, and all of them by the same network.

How many images are in a part, and an image's place in it, make a difference to its last bits with some libraries; which
thread takes the part, and how many there are, does not. So images are the same on any number of cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ddpmx.backends.base import Backend, Buffers, SharedBackend
from ddpmx.errors import BackendError

Take = Callable[[Iterator[Any]], None]


class Workers:
    """Threads that take turns at what there is to do. They begin with the first work for several.

    Args:
        threads: how many there are, the caller's own among them.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def run(self, items: Sequence[Any], takes: Sequence[Take]) -> None:
        """Have all items done.

        Args:
            items: what there is to do.
            takes: for each thread that is to work, a function that does what an iterator yields.

        Raises:
            Exception: what one of them raises. Then, as at Ctrl-C, no further item is begun.
        """
        left = iter(items)  # taking the next of a list iterator is one operation, whatever the threads do
        others: list[Future[None]] = []
        try:
            if self._process != os.getpid():  # a fork has the pool, but none of its threads
                self._pool, self._process = None, os.getpid()
            if len(takes) > 1 and self._pool is None:
                self._pool = ThreadPoolExecutor(self.threads - 1, thread_name_prefix="ddpmx-part")
            for take in takes[1:]:
                assert self._pool is not None
                try:
                    others.append(self._pool.submit(_until_one_fails, take, left))
                except RuntimeError as failed:
                    raise BackendError(
                        "no more threads can be started", note=str(failed), hint="--threads with fewer"
                    ) from failed
            _until_one_fails(takes[0], left)
        finally:
            for _ in left:  # where not all could begin
                pass
            errors = [other.exception() for other in others]  # waits: the buffers belong to the caller again
        for error in filter(None, errors):
            raise error

    def close(self) -> None:
        """End the threads. Safe to call again."""
        if self._pool is not None:
            self._pool.shutdown()
        self._pool = None


class Parts:
    """A network that runs in one thread, on several at once.

    Args:
        backend: it; closed with this one.
        part: the most images of a part.
        threads: how many parts run at once.
    """

    def __init__(self, backend: SharedBackend, part: int, threads: int) -> None:
        self._backend, self._largest = backend, part
        self._part, self._workers = part, Workers(threads)
        self._parts: list[_Part] = []
        self._closed = False

    @property
    def description(self) -> str:
        """The network's, and how many threads run it."""
        used = min(self._workers.threads, max(1, len(self._parts)))
        return f"{self._backend.description}, {used} thread{'s' if used > 1 else ''}"

    @property
    def largest_part(self) -> int:
        """See :attr:`ddpmx.backends.base.PartBackend.largest_part`."""
        return self._largest

    def use_part(self, part: int) -> None:
        """See :meth:`ddpmx.backends.base.PartBackend.use_part`."""
        self._part = part

    def bind(self, buffers: Buffers) -> None:
        """Use these buffers.

        Raises:
            BackendError: it is closed, or the network does not take them.
        """
        if self._closed:
            raise BackendError(f"{self._backend.description}: the file is closed")
        self._release()
        for first in range(0, len(buffers.x), self._part):
            rows = buffers.rows(slice(first, first + self._part))
            whole = rows if len(rows.x) == self._part else _filled(rows, self._part)
            self._parts.append(_Part(self._backend.share(), whole, rows))
            self._parts[-1].backend.bind(whole)

    def enqueue(self) -> None:
        """Run the network once.

        Raises:
            BackendError: it failed.
        """
        self._workers.run(self._parts, [_run_all] * min(len(self._parts), self._workers.threads))

    def share(self) -> Parts:
        """One of the same network for another thread, with buffers of its own."""
        shared = self._backend.share()
        assert isinstance(shared, SharedBackend)
        return Parts(shared, self._largest, self._workers.threads)

    def close(self) -> None:
        """Release the network. Safe to call again."""
        self._closed = True
        self._workers.close()
        self._release()
        self._backend.close()

    def _release(self) -> None:
        for part in self._parts:
            part.backend.close()
        self._parts = []


def _until_one_fails(take: Take, left: Iterator[Any]) -> None:
    try:
        take(left)
    finally:
        for _ in left:  # after an error or Ctrl-C: nobody begins another
            pass


@dataclass
class _Part:
    """A part of a batch: what runs it, on which buffers, and the caller's, which are fewer where it is filled up."""

    backend: Backend
    whole: Buffers
    rows: Buffers

    def run(self) -> None:
        whole, rows, filled = self.whole, self.rows, self.whole is not self.rows
        n = len(rows.x)
        if filled:
            for name, array in whole.inputs().items():
                array[:n] = rows.inputs()[name]
                array[n:] = array[n - 1]
        self.backend.enqueue()
        if filled:
            for name, array in rows.outputs().items():
                array[...] = whole.outputs()[name][:n]


def _run_all(left: Iterator[_Part]) -> None:
    for part in left:
        part.run()


def _filled(rows: Buffers, part: int) -> Buffers:
    """Buffers like these for ``part`` images."""
    shapes = {name: array.shape[1:] for name, array in rows.inputs().items() if name not in ("x", "t")}
    channels, height, width = rows.x.shape[1:]
    return Buffers.of(part, (channels, height, width), var=rows.var is not None, conditioning_shapes=shapes)
