"""How the threads of a session on the CPU wait for each other: spinning, or asleep where others compute beside.

ONNX Runtime's threads spin for tens of milliseconds by themselves. On an idle machine a thousandth of a second is as fast;
beside busy processes each spin takes the time that the other threads need. How work is split, and so every bit, depends on
the number of threads alone. ``docs/performance.md`` has the figures, ``tests/benchmarks/ort_options.py`` measures them.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

SPIN_MICROSECONDS = 1000
"""How long a waiting thread spins before it sleeps. Versions before 1.26 ignore it."""

_SAMPLES, _PAUSE = 5, 0.002


def set_waiting(options: Any, threads: int, *, root: Path = Path("/")) -> bool:
    """Set how a session's threads wait. It takes a hundredth of a second, and none for one thread.

    Args:
        options: the session's options.
        threads: its threads; 0 for one per core.
        root: root folder of the system's files.

    Returns:
        Whether they sleep at once, since others compute here.
    """
    if threads == 1:
        return False
    sleeping = _crowded(threads, root)
    if sleeping:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    else:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
    return sleeping


def _crowded(threads: int, root: Path) -> bool:
    """Whether the threads that run by now leave too few cores free. False where the system does not say so."""
    cores = os.cpu_count() or 1
    if len(getattr(os, "sched_getaffinity", lambda _: range(cores))(0)) < cores:
        return False  # the system counts what runs on all cores, and not on those that this process may use
    running = []
    for number in range(_SAMPLES):
        if number:
            time.sleep(_PAUSE)  # else the samples would be one: a short task may just be running
        try:
            lines = (root / "proc/stat").read_text().splitlines()
            running.append(next(int(line.split()[1]) for line in lines if line.startswith("procs_running ")))
        except (OSError, ValueError, IndexError, StopIteration):
            return False
    return statistics.median(running) - 1 + (threads or cores) > cores  # this thread runs as well
