"""Writing without ever leaving half a file: a temporary name in the same folder, then one rename."""

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
    """Open ``path`` for writing; it appears under its name only once the block has ended without an exception.

    A reader therefore sees the old content or the new one, never a part. The data are on disk before the rename.

    Raises:
        OutputError: the folder cannot be written, or the disk is full. ``path`` is then as it was before.
    """
    path = Path(os.path.realpath(path))  # a link stays one; what it points to is replaced
    if os.path.exists(path) and not path.is_file():
        raise OutputError(f"{path}: stands in the way, and is no file", hint="choose another name")
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
    """See that writing ``path`` replaces nothing but something of its own kind, told by its name or its first bytes.

    Raises:
        OutputError: another file stands there.
    """
    if path.suffix.lower() in suffixes or not path.is_file():
        return
    with contextlib.suppress(OSError), path.open("rb") as stream:
        head = stream.read(16)
        if not head or head.startswith(begins):
            return
    raise OutputError(f"{path}: a file that is no such thing would be replaced by {what}", hint=f"-o NAME{suffixes[0]}")


def write_error(path: str | os.PathLike[str], error: OSError) -> OutputError:
    """The :class:`OutputError` for an ``OSError`` met while writing ``path``."""
    return OutputError(
        f"{path}: cannot be written",
        note=f"{error.strerror or error}; nothing was left behind",
        hint="free some space, or choose another place",
    )


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder and its parents, and see that it can be written to.

    Raises:
        OutputError: a file stands there, or it cannot be made or written to.
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
            hint="choose another folder, or see who owns this one",
        ) from error
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
