"""One step of the check: a command in a process of its own, with a time limit. Its output is always kept."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

Must = Literal["", "if run", "always"]
Status = Literal["ok", "failed", "timed out", "crashed", "not run", "not needed"]

FINE: tuple[Status, ...] = ("ok", "not run", "not needed")
"""How a step may end without having failed."""

LEAST = 5.0
"""Seconds without which a step is not begun."""

TAIL = 1500
"""Characters of a failing step's output that the report shows."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A step to run.

    Attributes:
        name: of the step and its log.
        command: the command line; empty for a step that cannot run.
        seconds: its time limit.
        must: whether the verdict depends on it: "always", "if run" (it may be left out), or "" for never.
        needs: files that earlier steps make.
        makes: files that have to exist afterwards.
        not_run: why it is not run, if it is not.
        unless: files of earlier steps that make it unnecessary, if all are there.
        engine: whether it runs a plan. Where all tests of engines were skipped its failure proves nothing.
    """

    name: str
    command: Sequence[str] = ()
    seconds: float = 600.0
    must: Must = ""
    needs: tuple[Path, ...] = ()
    makes: tuple[Path, ...] = ()
    not_run: str = ""
    unless: tuple[Path, ...] = ()
    engine: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a step.

    Attributes:
        name, must, engine: of the step.
        status: how it ended.
        code: the exit code, or None.
        seconds: how long it took.
        why: the reason in one line, unless the status is "ok".
        tail: the end of its output.
    """

    name: str
    must: Must
    status: Status
    code: int | None = None
    seconds: float = 0.0
    why: str = ""
    tail: str = ""
    engine: bool = False

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def run(step: Step, folder: Path, *, cwd: Path, environment: Mapping[str, str]) -> Result:
    """Run one step. Ctrl-C ends it and is raised; no other exception is.

    Args:
        step: the step.
        folder: of the logs.
        cwd: its working directory.
        environment: variables to set, in addition to the present ones.
    """
    return dataclasses.replace(_run(step, folder, cwd, environment), engine=step.engine)


def _run(step: Step, folder: Path, cwd: Path, environment: Mapping[str, str]) -> Result:
    if step.unless and all(path.exists() for path in step.unless):
        return Result(step.name, step.must, "not needed", why=f"{step.unless[0].name} is there")
    missing = [path.name for path in step.needs if not path.exists()]
    if step.not_run or missing:
        why = step.not_run or f"{', '.join(missing)} is not there: an earlier step did not make it"
        return Result(step.name, step.must, "not run", why=why)
    log = folder / f"{step.name.replace(' ', '-')}.log"
    begun, code, late = time.monotonic(), None, False
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                list(step.command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        except OSError as error:
            return Result(step.name, step.must, "failed", why=f"it does not start: {error}")
        try:
            code = process.wait(step.seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            _end(process)
    seconds, tail = time.monotonic() - begun, _tail(log)
    outcome: dict[str, Any] = {"code": code, "seconds": seconds, "tail": tail}
    if late:
        return Result(step.name, step.must, "timed out", why=f"it was ended after {step.seconds:.0f} s", **outcome)
    if code is not None and code < 0:
        return Result(step.name, step.must, "crashed", why=f"by signal {_signal(-code)}", **outcome)
    if code != 0:
        return Result(step.name, step.must, "failed", why=_last_line(tail) or f"exit code {code}", **outcome)
    if missing := [path.name for path in step.makes if not path.exists()]:
        return Result(step.name, step.must, "failed", why=f"it did not make {', '.join(missing)}", **outcome)
    return Result(step.name, step.must, "ok", **outcome)


def run_until(
    ends: float | None,
    step: Step,
    folder: Path,
    *,
    cwd: Path,
    environment: Mapping[str, str],
    longest: float = math.inf,
) -> Result:
    """As :func:`run`, but not beyond a moment. What that cuts off or leaves out has not failed: it was not run.

    Args:
        ends: by :func:`time.monotonic`; None for no end.
        step, folder, cwd, environment: as for :func:`run`.
        longest: seconds that a step may take at most, so that one that hangs leaves time for the others.
    """
    if ends is None:
        return run(step, folder, cwd=cwd, environment=environment)
    left = ends - time.monotonic()
    if left < LEAST and not step.not_run:
        return Result(step.name, step.must, "not run", why="no time was left (--minutes)")
    left = min(left, longest)
    result = run(dataclasses.replace(step, seconds=min(step.seconds, left)), folder, cwd=cwd, environment=environment)
    if result.status == "timed out" and left < step.seconds:
        return dataclasses.replace(result, status="not run", why=f"cut off after {result.seconds:.0f} s (--minutes)")
    return result


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started, if it still runs."""
    if process.poll() is not None:
        return
    with contextlib.suppress(OSError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process that waits for a lost GPU may not end
        process.wait(10)


def _tail(log: Path) -> str:
    text = log.read_bytes()[-4 * TAIL :].decode("utf-8", "replace")
    return text[-TAIL:].strip()


def _last_line(text: str) -> str:
    """The line that begins with "Error:", or else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("Error:", "E  "))]
    return (errors or lines or [""])[-1][:300]


def _signal(number: int) -> str:
    with contextlib.suppress(ValueError):
        return f"{number} ({signal.Signals(number).name})"
    return str(number)
