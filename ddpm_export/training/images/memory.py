"""How much memory images may take before they are left on disk."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

UNKNOWN = 8 << 30
"""The limit where the system does not say how much is free."""


def default_limit() -> int:
    """Half of the memory that is free for this process, in bytes: by the system, and by its control group's limit."""
    free = [value for value in (_of_system(), _of_group()) if value is not None]
    return min(free) // 2 if free else UNKNOWN


def _of_system() -> int | None:
    with contextlib.suppress(OSError):
        if found := re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE):
            return int(found[1]) << 10
    with contextlib.suppress(
        OSError, ValueError, AttributeError
    ):  # macOS: what is there, of which half is assumed free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return None


def _of_group(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container may still take: of version 2, then of version 1. File pages that can be given back count as free."""
    for limit, used, freeable in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):
            most = int((root / limit).read_text())  # "max" is no number
            status = ((root / limit).parent / "memory.stat").read_text()
            found = re.search(rf"^{freeable} (\d+)", status, re.MULTILINE)
            return max(0, most - int((root / used).read_text()) + (int(found[1]) if found else 0))
    return None
