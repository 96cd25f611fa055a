"""How much memory images may take before they are left on disk."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path, PurePosixPath

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


def _of_group(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """What this process' control groups may still take: the least of its own and of those around it.

    A container sees its own as the outermost. A job of SLURM or systemd lies deeper.

    Args:
        root: where control groups are mounted.
        own: the kernel's list of the process' groups, "0::/path" (version 2) or "4:memory:/path" (version 1).
    """
    paths = {"": "/", "memory": "/"}
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            paths |= {name: path for name in controllers.split(",") if name in paths}
    free = [
        _left(root / first / part, *names)
        for first, path, names in (("", paths[""], _VERSION_2), ("memory", paths["memory"], _VERSION_1))
        for part in (PurePosixPath(path.strip("/")), *PurePosixPath(path.strip("/")).parents)
    ]
    return min((left for left in free if left is not None), default=None)


_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _left(group: Path, limit: str, used: str, freeable: str) -> int | None:
    """What one group may still take, or None without a limit. File pages that can be given back count as free."""
    with contextlib.suppress(OSError, ValueError):
        most = int((group / limit).read_text())  # "max" is no number
        found = re.search(rf"^{freeable} (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
        return max(0, most - int((group / used).read_text()) + (int(found[1]) if found else 0))
    return None
