"""Shared by the commands: output, errors, progress displays, and parsing of flags."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ddpmx.errors import DdpmxError, InputError, OutputError
from ddpmx_cli import signals

if TYPE_CHECKING:
    from rich.progress import Progress


LOG_SECONDS = 30.0
"""Between lines of progress, where standard error is no terminal."""

output_failed = False
"""Whether writing to standard output failed."""


_quiet = False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Say nothing: another process of the same training does."""
    global _quiet
    _quiet = True
    try:
        yield
    finally:
        _quiet = False


def say(text: str) -> None:
    """Print a line of result on standard output. If that fails, the work continues nevertheless."""
    signals.check()
    if _quiet:
        return
    try:
        print(text, flush=True)
    except OSError as error:
        global output_failed
        output_failed = not isinstance(error, BrokenPipeError)  # `ddpmx … | head` is not an error
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
        if output_failed:
            complain(OutputError("standard output cannot be written", note=error.strerror))


def complain(error: DdpmxError) -> None:
    """Print an error on standard error."""
    try:
        print("Error: " + "\n".join(map(plain, str(error).split("\n"))), file=sys.stderr, flush=True)
    except (
        OSError,
        ValueError,
    ):  # without standard error the exit code has to do
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - Python would end with 120


@contextlib.contextmanager
def progress_bar(*columns: str, unit: str = "", remaining: bool = True) -> Iterator[Progress]:
    """A progress display on standard error, if it is a terminal; ``remaining``: with the time left, by rich."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    silent = _quiet or not console.is_terminal
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        *columns,
        *[TimeRemainingColumn()] * remaining,
        console=console,
        transient=True,
        disable=silent,
    )
    # rich before 14.3 ends a disabled display with an empty line
    with contextlib.nullcontext() if silent else progress:
        yield progress


class _Log:
    """What is being done, as a line on standard error every :data:`LOG_SECONDS`; used where that is no terminal.

    A thread writes it, since one call of a library may take minutes.
    """

    def __init__(self, description: str, unit: str = "") -> None:
        self.description, self._unit, self._done, self._total = description, unit, 0, 0
        self._begun, self._ended = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)

    def update(self, done: int, total: int) -> None:
        self._done, self._total = done, total

    def line(self) -> str:
        """Such as "64 images: 1,200 of 4,000 steps, 3 min left"."""
        seconds, done, total = time.monotonic() - self._begun, self._done, self._total
        if not 0 < done <= total:
            return f"{plain(self.description)}: {duration(seconds)} so far"
        left = duration(seconds / done * (total - done))
        return f"{plain(self.description)}: {done:,} of {total:,}{' ' * bool(self._unit)}{self._unit}, {left} left"

    def _write(self) -> None:
        while not self._ended.wait(LOG_SECONDS):
            with contextlib.suppress(OSError, ValueError):
                print(self.line(), file=sys.stderr, flush=True)

    def __enter__(self) -> _Log:
        if not sys.stderr.isatty():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=1)


@contextlib.contextmanager
def counting(description: str, unit: str = "") -> Iterator[Callable[[int, int], None]]:
    """A progress display; yields a function that takes (done, in all)."""
    with progress_bar(unit=unit) as progress, _Log(description, unit) as log:
        task = progress.add_task(description, total=None)

        def show(done: int, total: int) -> None:
            signals.check()
            progress.update(task, completed=done, total=total)
            log.update(done, total)

        yield show


@contextlib.contextmanager
def busy(description: str) -> Iterator[None]:
    """A spinner, for work of unknown length."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    with console.status(escape(description)) if console.is_terminal else _Log(description):
        yield
    signals.check()


@contextlib.contextmanager
def phases(description: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress display; yields a function that takes (phase, done, in all)."""
    with progress_bar() as progress, _Log(description) as log:
        task = progress.add_task(description, total=None)

        def show(phase: str, done: int, total: int) -> None:
            signals.check()
            log.description = f"{description}: {phase}"
            log.update(done, total)
            progress.update(task, description=f"{description}: {phase}", completed=done, total=total)

        yield show


def cache_folder() -> Path | None:
    """ddpmx's folder in the user's cache; None if there is no home folder."""
    with contextlib.suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpmx"
    return None


def plain(text: str) -> str:
    """``text`` with control characters and line breaks escaped, safe to print on a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def counted(n: int, what: str) -> str:
    """ "1 image", "2 images"."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def duration(seconds: float) -> str:
    """A duration as text: "3 h"."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def megabytes(path: str | os.PathLike[str]) -> str:
    """The size of a file as text: "35.7 MB"."""
    return f"{os.path.getsize(path) / 1e6:.1f} MB"


def check_threads(threads: int) -> int:
    """The callback of ``--threads`` where ONNX Runtime takes it.

    Raises:
        InputError: out of range.
    """
    from ddpmx.backends.ort import MAX_THREADS

    if not 0 <= threads <= MAX_THREADS:
        raise InputError(f"--threads must be from 0 to {MAX_THREADS}, not {threads}", hint="omit it: one per core")
    return threads


def parse_size(text: str | None, flag: str = "--size") -> tuple[int, int] | None:
    """ "64" or "64x48" (height first) → (H, W).

    Raises:
        InputError: it is neither.
    """
    if text is None:
        return None
    parts = text.lower().replace("×", "x").split("x")
    try:
        sides = [int(part) for part in parts]
        height, width = sides * 2 if len(sides) == 1 else sides
    except ValueError:
        raise InputError(f"{flag} {text!r} is not a size", hint=f"{flag} 64, or {flag} 64x48 (height first)") from None
    return height, width


def parse_numbers(flag: str, text: str) -> tuple[int, ...]:
    """ "1,2,2" → (1, 2, 2); an empty text gives ().

    Raises:
        InputError: it is not a list of whole numbers.
    """
    try:
        return tuple(int(part) for part in text.split(",")) if text.strip() else ()
    except ValueError:
        raise InputError(f"{flag} {text!r} is not a list of whole numbers", hint=f"{flag} 1,2,2") from None
