"""Networks that a process has inherited from the one that forked it, as multiprocessing does on Linux up to Python 3.13.

A fork copies the memory and none of the threads but its own. A library whose threads wait in a pool then waits for ever
when such a pool is freed, since nobody wakes up: a worker of a DataLoader that drops a pipeline would never end.
"""

from __future__ import annotations

import os
import weakref
from typing import Any

_with_threads: weakref.WeakSet[Any] = weakref.WeakSet()
_inherited: list[Any] = []


def never_free_in_forks(owner: Any) -> None:
    """Have processes that are forked from this one keep what owns threads, for as long as they live.

    Args:
        owner: an object that weak references can point to. In this process it is freed as before.
    """
    _with_threads.add(owner)


def _keep_all() -> None:
    _inherited.extend(_with_threads)


if hasattr(os, "register_at_fork"):  # systems without it do not fork
    os.register_at_fork(after_in_child=_keep_all)
