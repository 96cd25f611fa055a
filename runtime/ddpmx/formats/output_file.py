"""What is refused before a file is written, however long its making takes."""

from __future__ import annotations

import os
import shlex
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ddpmx.errors import DdpmxError, OutputError
from ddpmx.formats import png_text
from ddpmx.formats.envelope import parse_json

PLOT = "plot"
"""What a plot has under ``task`` in its text."""

_LOOKED_AT, _LARGEST_JSON = 1 << 16, 1 << 26
_LONGEST_NAME = 230  # bytes: with the additions of its temporary name it must fit into 255


def check_output(
    output: Path,
    inputs: Sequence[Path],
    *,
    what: str,
    suffix: str,
    is_ours: Callable[[Path], bool],
    hint: str | None = None,
) -> None:
    """Check that a file can be written, and replaces nothing but an older file of its kind.

    Args:
        output: the file.
        inputs: the files that it is made from.
        what: the kind of file, for messages: "a plan".
        suffix: of such files, for the hint; "" where nobody chooses their name.
        is_ours: whether an existing file may be replaced. So may an empty one.
        hint: what to do about a file that may not; by default another name.

    Raises:
        OutputError: it cannot be written there.
    """
    if output.is_dir():
        inside = f"-o {shlex.quote(str(output / f'model{suffix}'))}" if suffix else "another -o"
        raise OutputError(f"{output}: is a folder", hint=inside)
    if not output.parent.is_dir():
        raise OutputError(f"{output}: there is no folder {output.parent}", hint="create it, or choose another -o")
    if len(os.fsencode(output.name)) > _LONGEST_NAME:
        raise OutputError(f"{output.name[:40]}…: too long for a file name", hint="another -o")
    if not os.path.lexists(output):
        return
    if not output.is_file():
        raise OutputError(f"{output}: exists and is not a regular file", hint="another -o")
    if any(output.samefile(path) for path in inputs):
        raise OutputError(f"refusing to overwrite {output}: it is made from this file", hint="another -o")
    try:
        ours = output.stat().st_size == 0 or is_ours(output)
    except OSError:
        ours = False
    if not ours:
        raise OutputError(
            f"refusing to overwrite {output}: not {what}",
            hint=hint or (f"-o NAME{suffix}" if suffix else "another -o"),
        )


def begins_with(path: Path, begins: tuple[bytes, ...]) -> bool:
    """Whether a file begins with one of these bytes.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        return stream.read(16).startswith(begins)


def is_npz_of(path: Path, form: str) -> bool:
    """Whether an .npz says in its array ``about`` that it is of this format. Others' may begin with the same bytes."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("about.npy") as stream:
            return form.encode() in stream.read(_LOOKED_AT)
    except Exception:  # a damaged archive raises anything; and it is not ours as far as one can tell
        return False


def is_report(path: Path) -> bool:
    """Whether a JSON file names the ddpmx that has written it."""
    try:
        values = parse_json(path.read_bytes()) if path.stat().st_size < _LARGEST_JSON else None
    except (OSError, DdpmxError):
        return False
    return isinstance(values, dict) and "ddpmx" in values


def is_plot(path: Path) -> bool:
    """Whether a PNG is a plot that ddpmx has drawn, and no picture."""
    try:
        return png_text.read_png_text(path)[1].get("task") == PLOT
    except (OSError, DdpmxError):
        return False
