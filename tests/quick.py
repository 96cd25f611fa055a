"""``pytest --quick``: leaves out what took long the last times, so that `make check` ends within two minutes.

What a test takes is remembered in pytest's cache at each run, by whatever command. Test files that were changed since the
last commit are run as a whole.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

LONG = 0.1
"""Seconds. Most tests take less, and all of them together a small part of the time."""

KEY = "ddpmx/seconds"
"""In pytest's cache: the shortest time of each test so far, of those above :data:`LONG`."""


class Quick:
    """The plugin.

    Args:
        config: pytest's.
        root: the repository.
    """

    def __init__(self, config: pytest.Config, root: Path) -> None:
        self.config, self.root = config, root
        self.taken: dict[str, float] = {}

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up a test's parts; what a fixture takes for many tests is not the test's own."""
        if report.when == "call":
            self.taken[report.nodeid] = report.duration

    @pytest.hookimpl
    def pytest_sessionfinish(self) -> None:
        cache = getattr(self.config, "cache", None)  # there is none with -p no:cacheprovider
        if cache is None or hasattr(self.config, "workerinput"):  # one of several processes; the first has all reports
            return
        known: dict[str, float] = cache.get(KEY, {})
        for name, seconds in self.taken.items():
            shortest = min(seconds, known.get(name, seconds))
            if shortest > LONG:
                known[name] = round(shortest, 2)
            else:
                known.pop(name, None)
        cache.set(KEY, known)

    @pytest.hookimpl
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        cache = getattr(config, "cache", None)
        if not config.getoption("quick") or cache is None:
            return
        known: dict[str, float] = cache.get(KEY, {})
        changed = set(changed_files(self.root))
        parts: dict[bool, list[pytest.Item]] = {True: [], False: []}
        for item in items:
            parts[item.nodeid in known and item.path not in changed].append(item)
        config.hook.pytest_deselected(items=parts[True])
        items[:] = parts[False]


def changed_files(root: Path) -> Iterable[Path]:
    """Files that differ from the last commit, new ones too; none where git cannot say."""
    try:
        done = subprocess.run(
            ["git", "status", "--porcelain=v1", "-z", "--untracked-files=all"],
            cwd=root,
            capture_output=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [root / entry[3:].decode(errors="surrogateescape") for entry in done.stdout.split(b"\0") if len(entry) > 3]
