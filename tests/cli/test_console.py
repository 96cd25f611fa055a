"""What a command says of its progress where standard error is no terminal."""

from __future__ import annotations

import time

import pytest

from ddpmx_cli import console


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(console, "LOG_SECONDS", 0.05)


def lines_during(capsys, work):
    work()
    return capsys.readouterr().err.splitlines()


def test_a_long_chain_is_not_silent(quick, capsys):
    def work():
        with console.counting("64 images", unit="steps") as progress:
            progress(1000, 4000)
            time.sleep(0.3)  # one call of a library

    lines = lines_during(capsys, work)
    assert 2 <= len(lines) <= 6
    assert all(line.startswith("64 images: 1,000 of 4,000 steps, ") and line.endswith(" left") for line in lines)


@pytest.mark.parametrize("kind", ["busy", "phases"])
def test_work_of_unknown_length_says_how_long_it_has_run(quick, capsys, kind):
    def work():
        with getattr(console, kind)("exporting x"):
            time.sleep(0.2)

    lines = lines_during(capsys, work)
    assert lines
    assert all(line == "exporting x: 0 s so far" for line in lines)


def test_short_work_says_nothing_and_a_terminal_has_its_display(capsys, monkeypatch):
    with console.counting("x") as progress:
        progress(1, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(console, "LOG_SECONDS", 0.01)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with console._Log("x"):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_the_time_left_follows_from_what_is_done(monkeypatch):
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    log = console._Log("x", "steps")
    log.update(100, 400)
    now = 1000.0
    assert log.line() == "x: 100 of 400 steps, 50 min left"  # 10 s a step, 300 to go
