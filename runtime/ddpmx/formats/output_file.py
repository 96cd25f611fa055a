"""What is refused before a file is written, however long its making takes."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from ddpmx.errors import OutputError

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
