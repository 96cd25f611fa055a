"""Atomic writes: a temporary file in the same folder, then one rename."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ddpmx.errors import OutputError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open ``path`` for writing; the file gets its name only once the block has ended without an exception.

    A reader therefore sees the old content or the new one, never a part. The data are on disk before the rename.

    Raises:
        OutputError: the folder cannot be written, or the disk is full. ``path`` is then unchanged.
    """
    path = Path(os.path.realpath(path))  # a link stays a link; its target is replaced
    if os.path.exists(path) and not path.is_file():
        raise OutputError(f"{path}: exists and is not a regular file", hint="choose another name")
    temporary: str | None = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that nobody else may read
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise


def check_replaceable(path: Path, *, what: str, suffixes: tuple[str, ...], begins: tuple[bytes, ...]) -> None:
    """Refuse to overwrite a file of another kind.

    Args:
        path: the file to be written.
        what: the kind of file, for the message: "a plan".
        suffixes: lower-case suffixes; a file with one of them may be replaced.
        begins: the first bytes of files of this kind, which may be replaced whatever their name. So may an empty file.

    Raises:
        OutputError: there is a file of another kind.
    """
    if path.suffix.lower() in suffixes or not path.is_file():
        return
    with contextlib.suppress(OSError), path.open("rb") as stream:
        head = stream.read(16)
        if not head or head.startswith(begins):
            return
    raise OutputError(f"refusing to overwrite {path}: not {what}", hint=f"-o NAME{suffixes[0]}")


def write_error(path: str | os.PathLike[str], error: OSError) -> OutputError:
    """The :class:`OutputError` for an ``OSError`` raised while writing ``path``."""
    return OutputError(
        f"{path}: cannot be written",
        note=f"{error.strerror or error}; nothing was left behind",
        hint="free some space, or choose another place",
    )


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder and its parents, and check that it is writable.

    Raises:
        OutputError: there is a file of that name, or the folder cannot be made or written to.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be used as a folder to write to",
            note=str(error.strerror or error),
            hint="choose another folder, or check the permissions of this one",
        ) from error
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
