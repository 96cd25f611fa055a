"""The signal that stops a command, remembered until it ends.

A signal's exception may be raised in the middle of foreign code, which turns it into an error of its own (an import that
fails, "torch could not export") or swallows it. So it is kept here: it decides the exit code, and whether an error that
came after it is worth a word.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

STOPPING = (signal.SIGINT, signal.SIGTERM)

received: int | None = None
"""The first signal that this command got."""

raised = False
"""Whether an exception was raised for it: what went wrong after that is no news."""


def install() -> None:
    """Handle signals from here on: remember the first, and raise an exception, so that cleanup runs."""
    global received, raised
    received, raised = None, False
    for number in STOPPING:
        signal.signal(number, _stop)


def end_at_once() -> None:
    """From here on a signal ends the process at once, with its exit code: nothing needs to be cleaned up."""
    for number in STOPPING:
        signal.signal(number, lambda number, _: os._exit(128 + number))


def end() -> None:
    """Everything is done. Signals are ignored once the interpreter ends, since it restores the default handlers then."""
    end_at_once()
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in STOPPING])


def check() -> None:
    """Raise the exception of a signal again, if foreign code has swallowed it."""
    if raised:
        _raise()


@contextlib.contextmanager
def held() -> Iterator[Callable[[], bool]]:
    """Within it a signal is remembered and nothing more, for work that stops at a place of its own choice.

    Yields a function that says whether there was one. A second Ctrl-C stops at once.
    """
    stopped = False

    def note(number: int, _: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        _remember(number)
        signal.signal(signal.SIGINT, _stop)

    earlier = {number: signal.signal(number, note) for number in STOPPING}
    try:
        yield lambda: stopped
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _stop(number: int, _: FrameType | None) -> None:
    global raised
    _remember(number)
    raised = True
    _raise()


def _remember(number: int) -> None:
    global received
    if received is None:
        received = number


def _raise() -> NoReturn:
    if received == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + (received or 0))
