"""`make check` leaves out what took long, and nothing of a test file that is being edited."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quick import KEY, LONG, Quick, changed_files


class Cache(dict[str, Any]):
    def set(self, key: str, value: Any) -> None:
        self[key] = value


def plugin(root: Path, cache: Cache) -> tuple[Quick, list[Any]]:
    gone: list[Any] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: gone.extend(items))
    config: Any = SimpleNamespace(cache=cache, hook=hook, getoption=lambda name: name == "quick")
    return Quick(config, root), gone


def ran(quick: Quick, **seconds: float) -> None:
    for name, taken in seconds.items():
        for when, duration in (("setup", 100.0), ("call", taken)):
            quick.pytest_runtest_logreport(
                SimpleNamespace(nodeid=name, when=when, duration=duration)  # type: ignore[arg-type]
            )
    quick.pytest_sessionfinish()


def test_the_shortest_time_decides_and_a_busy_machine_does_not(tmp_path):
    cache = Cache()
    ran(plugin(tmp_path, cache)[0], slow=3.0, fast=LONG / 2, busy=1.0)
    assert cache[KEY] == {"slow": 3.0, "busy": 1.0}
    ran(plugin(tmp_path, cache)[0], slow=5.0, busy=LONG / 2)
    assert cache[KEY] == {"slow": 3.0}


def test_long_tests_go_but_for_those_of_a_changed_file(tmp_path):
    for name in ("kept.py", "edited.py"):
        (tmp_path / name).write_text("1\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *arguments], cwd=tmp_path, check=True)
    (tmp_path / "edited.py").write_text("2\n")
    (tmp_path / "new name.py").write_text("3\n")
    assert set(changed_files(tmp_path)) == {tmp_path / "edited.py", tmp_path / "new name.py"}
    quick, gone = plugin(tmp_path, Cache({KEY: {"kept::long": 2.0, "edited::long": 2.0}}))
    names = ("kept::long", "kept::fast", "edited::long")
    items: list[Any] = [SimpleNamespace(nodeid=name, path=tmp_path / f"{name[:-6]}.py") for name in names]
    quick.pytest_collection_modifyitems(quick.config, items)
    assert [item.nodeid for item in items] == ["kept::fast", "edited::long"]
    assert [item.nodeid for item in gone] == ["kept::long"]


def test_without_git_nothing_counts_as_changed(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list(changed_files(tmp_path)) == []
