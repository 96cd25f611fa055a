"""Work on many files in threads: Pillow lets go of the interpreter while it decodes and resizes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ddpmx.device.cores import usable_cores

_In = TypeVar("_In")
_Out = TypeVar("_Out")

MOST = 8


def in_threads(work: Callable[[_In], _Out], items: Sequence[_In]) -> Iterator[_Out]:
    """``work(item)`` of every item, in their order, computed by as many threads as there are cores, up to eight.

    Only a few items are begun ahead, so that an exception (of the work, or Ctrl-C) ends it soon.
    """
    threads = min(MOST, usable_cores(), len(items))
    if threads <= 1:
        yield from map(work, items)
        return
    begun: deque[Future[_Out]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                begun.append(pool.submit(work, item))
                if len(begun) >= 4 * threads:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()
