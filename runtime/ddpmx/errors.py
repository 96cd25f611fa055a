"""What ddpmx raises: one tree, and every error says a fact, what was seen, and what to do.

``str(error)`` is the text that the command line prints::

    samples.npz: not an npz archive
    Note: it begins with b'<html>'
    Hint: download it again
"""

from __future__ import annotations

MAX_PART = 600
"""Characters of a fact, a note or a hint: what a file says may be as long as its author likes."""


def _shortened(text: str) -> str:
    """``text``, or its beginning and its end."""
    return text if len(text) <= MAX_PART else f"{text[: MAX_PART - 153]} … {text[-150:]}"


class DdpmxError(Exception):
    """A failure that the caller can do something about.

    Args:
        fact: one line, what is wrong. It names the file, flag or value.
        note: what was seen, if the fact does not say it already.
        hint: what to do about it.
    """

    def __init__(self, fact: str, *, note: str | None = None, hint: str | None = None) -> None:
        fact = _shortened(fact)
        note, hint = note and _shortened(note), hint and _shortened(hint)
        self.fact = fact
        self.note = note
        self.hint = hint
        lines = [fact]
        if note:
            lines.append(f"Note: {note}")
        if hint:
            lines.append(f"Hint: {hint}")
        super().__init__("\n".join(lines))


class InputError(DdpmxError):
    """A value the caller gave (a flag, a seed, a count) cannot be used."""


class DataError(DdpmxError):
    """Images that cannot be read, or do not fit together."""


class FileFormatError(DdpmxError):
    """A file is not what its name says: truncated, foreign, or of a version that this ddpmx does not know."""


class SpecError(DdpmxError):
    """What a model file says about itself is missing, contradicts itself, or does not fit the model."""


class OutputError(DdpmxError):
    """Something could not be written. Nothing half-written is left behind."""


class BackendError(DdpmxError):
    """The library that computes ε is missing, or refused."""


class PlanMismatchError(BackendError):
    """A plan was built for another platform, TensorRT or GPU than those that are here: it has to be built anew."""


class NumericError(DdpmxError):
    """The network returned NaN or an infinity."""


class Cancelled(DdpmxError):  # noqa: N818 - a request that was obeyed, not a fault
    """The caller asked the chain to stop, and it did."""
