"""The exceptions of ddpmx: one tree. Each states a fact and may add a note (what was seen) and a hint (what to do).

``str(error)`` is the text that the command line prints::

    samples.npz: not an npz archive
    Note: it begins with b'<html>'
    Hint: download it again
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_PART = 600
"""Longest fact, note or hint, in characters: text from a file can be as long as its author likes."""


MAX_ITEMS = 100
"""Longest list below a note."""


def _shortened(text: str) -> str:
    """``text``, or its beginning and end if it is too long."""
    return text if len(text) <= MAX_PART else f"{text[: MAX_PART - 153]} … {text[-150:]}"


class DdpmxError(Exception):
    """A failure that the caller can do something about.

    Args:
        fact: one line that says what is wrong and names the file, flag or value.
        note: what was seen, unless the fact already says it.
        hint: what to do about it.
        items: what the fact counts, each on a line of its own; beyond :data:`MAX_ITEMS` only their number.
    """

    def __init__(
        self, fact: str, *, note: str | None = None, hint: str | None = None, items: Sequence[str] = ()
    ) -> None:
        fact = _shortened(fact)
        note, hint = note and _shortened(note), hint and _shortened(hint)
        self.fact = fact
        self.note = note
        self.hint = hint
        self.items = tuple(items)
        lines = [fact]
        if note:
            lines.append(f"Note: {note}")
        lines += [f"  {_shortened(item)}" for item in items[:MAX_ITEMS]]
        if len(items) > MAX_ITEMS:
            lines.append(f"  … and {len(items) - MAX_ITEMS} more")
        if hint:
            lines.append(f"Hint: {hint}")
        super().__init__("\n".join(lines))


class InputError(DdpmxError):
    """A value passed by the caller (a flag, a seed, a count) cannot be used."""


class DataError(DdpmxError):
    """Images cannot be read, or do not fit together."""


class FileFormatError(DdpmxError):
    """A file is not in the expected format: truncated, of another program, or of a version unknown to this ddpmx."""


class SpecError(DdpmxError):
    """The description in a model file is missing, contradicts itself, or does not fit the model."""


class OutputError(DdpmxError):
    """A file could not be written. No partial file is left behind."""


class BackendError(DdpmxError):
    """The library that runs the network is missing, or failed."""


class PlanMismatchError(BackendError):
    """A plan was built for another platform, TensorRT version or GPU than this machine's: it has to be rebuilt."""


class NumericError(DdpmxError):
    """The network's output is NaN or infinite."""


class QueueFull(DdpmxError):  # noqa: N818 - a state that passes
    """Too many requests wait already: later there will be room."""


class Cancelled(DdpmxError):  # noqa: N818 - a request that was carried out, not a fault
    """The caller requested a stop, and the work was stopped."""
