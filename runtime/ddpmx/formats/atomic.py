"""Writing so that a file, or several that belong together, are the old ones or the new ones, whatever happens meanwhile.

Everything is written under a temporary name in the same folder and renamed once it is whole. A temporary name is chosen
before the file is made, so an interruption at any point finds it; and it is locked for as long as its process lives, so
that the next run can tell what a killed one left behind, and removes that alone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from ddpmx.errors import OutputError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_OURS = re.compile(r"\..{0,40}\.ddpmx-([0-9a-f]{16}\.part|lock)", re.DOTALL)
_OLD, _NEW = ".old", ".new"  # in a temporary folder: the files that are being replaced, and the names of the new ones
_FOLDER = "folder"  # the name of the lock under which the files of a folder are exchanged
_LEFT_SECONDS = 86400  # where nothing can be locked, a temporary file of this age belongs to nobody

_tidied: set[str] = set()


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
    tidy(path.parent)
    temporary = _temporary_path(path)
    try:
        with _create(temporary) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # it is gone once it was renamed
            os.unlink(temporary)


@contextlib.contextmanager
def staging(folder: Path, target: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder in ``folder``, for files that are to be renamed to their places once all of them are whole.

    Args:
        folder: an existing folder on the file system of what is to be written.
        target: what is to be written, for its name and for messages.

    Raises:
        OutputError: a file in it could not be written, as an error about ``target``. What is left in it is removed.
    """
    tidy(folder)
    part = _temporary_path(folder / (Path(target).name or "folder"))  # "." and "/" have no name
    descriptor = -1
    try:
        descriptor = _create_folder(part)
        yield part
    except OSError as error:
        raise write_error(target, error) from error
    except OutputError as error:
        if str(part) not in error.fact:
            raise
        # nobody knows the temporary folder, which is gone
        raise OutputError(f"{target}: cannot be written", note=error.note, hint=error.hint) from error
    finally:
        with contextlib.suppress(OSError), _exchange_lock(part):
            _discard(part)
        if descriptor >= 0:  # now only: what nobody holds, another run takes for left behind
            os.close(descriptor)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a new folder, which gets its name only once the block has ended without an exception.

    Raises:
        OutputError: ``path`` exists and is not an empty folder, or cannot be written. Nothing is then left behind.
    """
    path = Path(os.path.realpath(path))
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise OutputError(f"{path}: exists already, and is not an empty folder", hint="choose another -o")
    there = path.is_dir()
    if there and not os.access(path, os.W_OK | os.X_OK):  # the one that replaces it would be writable
        raise write_error(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(path, error) from error
        with staging(path.parent, path) as part:
            yield part
            sync_folder(part)
            if there:  # who may read it stays as it was
                shutil.copymode(path, part)
            if sys.platform == "win32" and path.exists():  # elsewhere an empty folder is replaced
                path.rmdir()
            part.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            for parent in missing:
                parent.rmdir()
        raise


def exchange(folder: Path, part: Path, names: Sequence[str], *, instead_of: Iterable[str] = ()) -> None:
    """Rename the files ``names`` from ``part`` to ``folder``, instead of files there: all of them, or none.

    The old files are moved away before the first new one appears, so no mixture of the two is ever to be seen. A failure
    puts them back. If the process is killed on the way, the next run does.

    Args:
        folder: where the files are to be.
        part: a :func:`staging` folder in ``folder``.
        names: the new files; files of the same names are replaced.
        instead_of: further files of ``folder`` that go, if they are there. Read once nobody else writes to it,
            so a generator may look what is there by then, and raise.

    Raises:
        OSError: a file could not be renamed. ``folder`` is then as it was.
    """
    old = part / _OLD
    with locked(folder / _FOLDER):  # first: where not even that can be made, nothing has to be put back under it
        try:
            write_synced(part / _NEW, json.dumps(list(names)).encode())
            old.mkdir()
            for name in dict.fromkeys((*names, *instead_of)):
                if os.path.lexists(folder / name):
                    os.replace(folder / name, old / name)
            for name in names:
                os.replace(part / name, folder / name)
            os.unlink(part / _NEW)  # from here on the new files count
        except BaseException:
            _put_back(part)
            raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of ``path``, and wait for it if another process does. The lock of a killed process is free.

    Raises:
        OSError: the lock's file, which lies beside ``path`` for as long as it is held, cannot be made.
    """
    lock = path.with_name(f".{path.name[:40]}.ddpmx-lock")
    descriptor = -1
    try:
        while True:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
            _hold(descriptor, wait=True)
            if _is_at(lock, descriptor):
                break
            os.close(descriptor)  # its last holder has removed the file meanwhile
            descriptor = -1
        yield
    finally:
        if descriptor >= 0:
            with contextlib.suppress(OSError):  # Windows removes no open files
                os.unlink(lock)
            os.close(descriptor)


def tidy(folder: Path) -> None:
    """Remove the temporary files that killed runs of ddpmx left in ``folder``; once per folder and process.

    What a running process still writes is left alone, and so is everything with a name of another kind. Where another
    process puts old files back, this one waits for them.
    """
    key = os.path.realpath(folder)
    if key in _tidied:
        return
    _tidied.add(key)
    with contextlib.suppress(OSError):
        for name in filter(_OURS.fullmatch, os.listdir(key)):
            left = Path(key, name)
            with contextlib.suppress(OSError), _exchange_lock(left), _taken(left) as is_left:
                if is_left:
                    _discard(left)


def write_synced(path: Path, data: bytes | memoryview) -> None:
    """Write a file of a :func:`staging` folder, and wait until its data are on disk."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(part: Path) -> None:
    """Wait until the data of every file in ``part`` are on disk."""
    for file in part.rglob("*"):
        if file.is_file():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())


@contextlib.contextmanager
def foreign_writer(path: str | os.PathLike[str], *errors: type[Exception]) -> Iterator[None]:
    """For another library's function that writes ``path`` itself: what it makes of a failed write becomes an OutputError.

    Where a library can write to memory instead, let it, and write its bytes here: its errors are then about its input.

    Args:
        path: the file that is written.
        errors: what the library raises beside ``OSError`` if it cannot write.

    Raises:
        OutputError: the library failed.
    """
    try:
        yield
    except (OSError,) + errors as error:  # noqa: RUF005 - mypy does not see through the star
        raise write_error(path, error) from error


def write_error(path: str | os.PathLike[str], error: Exception) -> OutputError:
    """The :class:`OutputError` for an error that was raised while ``path`` was written."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    if number := re.search(r"\(os error (\d+)\)", text):  # as libraries written in Rust report it
        text = os.strerror(int(number[1]))
    denied = isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS
    return OutputError(
        f"{path}: cannot be written",
        note=f"{text.splitlines()[0] if text else type(error).__name__}; nothing was left behind",
        hint=f"{'check the permissions' if denied else 'free some space'}, or choose another place",
    )


def check_folder(path: Path) -> None:
    """Check that a folder is there, or nothing that would be in its way.

    Raises:
        OutputError: it is a file, or would be in one.
    """
    for part in (path, *path.parents):
        if os.path.lexists(part) and not part.is_dir():
            what = "is a file" if os.path.exists(part) else "is a link to nothing"
            raise OutputError(f"{part}: {what}, and a folder is needed to write to", hint="choose another folder")


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder and its parents, and check that it is writable.

    Raises:
        OutputError: there is a file of that name, or the folder cannot be made or written to.
    """
    path = Path(path)
    check_folder(path)
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
    tidy(path)
    return path


def _temporary_path(path: Path) -> Path:
    """A new name beside ``path``. It is kept short: with ``path``'s whole name it might be too long for a file name."""
    return path.with_name(f".{path.name[:40]}.ddpmx-{secrets.token_hex(8)}.part")


def _create(temporary: Path) -> BinaryIO:
    """Create and lock a temporary file, with the permissions of any new file."""
    while True:
        stream = temporary.open("xb")
        try:
            if _hold(stream.fileno()) and _is_at(temporary, stream.fileno()):
                return stream
        except BaseException:
            stream.close()
            raise
        stream.close()  # a run that tidies up was faster than the lock
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _create_folder(part: Path) -> int:
    """Create and lock a temporary folder; the descriptor of the lock, -1 without one."""
    while True:
        part.mkdir()
        if sys.platform == "win32":  # it has no locks for folders
            return -1
        try:
            descriptor = os.open(part, os.O_RDONLY)
        except FileNotFoundError:
            continue
        if _hold(descriptor) and _is_at(part, descriptor):
            return descriptor
        os.close(descriptor)
        with contextlib.suppress(OSError):
            part.rmdir()


def _hold(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file for as long as it stays open. False: another process holds the lock."""
    if sys.platform == "win32":
        while True:
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
                return True
            except OSError:
                if not wait:
                    return False
                time.sleep(0.05)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether ``path`` is the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _taken(path: Path) -> Iterator[bool]:
    """Whether the process that made the temporary ``path`` is gone. Then nobody else takes it within the block."""
    descriptor = -1
    try:
        state = os.lstat(path)
        is_left = stat.S_ISREG(state.st_mode) or stat.S_ISDIR(state.st_mode)
        by_age = time.time() - state.st_mtime > _LEFT_SECONDS
        if is_left and sys.platform == "win32":
            is_left = by_age
        elif is_left:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_left = _is_at(path, descriptor)
            except BlockingIOError:
                is_left = False
            except OSError:  # a file system without locks
                is_left = by_age
    except OSError:
        is_left = False
    try:
        yield is_left
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _exchange_lock(part: Path) -> contextlib.AbstractContextManager[None]:
    """The lock of an :func:`exchange`, if one in ``part`` has not come to its end: to put old files back is one as well."""
    return locked(part.parent / _FOLDER) if _is_interrupted(part) else contextlib.nullcontext()


def _is_interrupted(part: Path) -> bool:
    return (part / _OLD).is_dir() and (part / _NEW).is_file()


def _discard(part: Path) -> None:
    """Remove a temporary file or folder. Old files in a folder whose exchange was interrupted are put back before."""
    if not part.is_dir():
        with contextlib.suppress(OSError):
            os.unlink(part)
        return
    if _put_back(part):
        shutil.rmtree(part, ignore_errors=True)


def _put_back(part: Path) -> bool:
    """Undo an :func:`exchange` that did not come to its end, under its lock. False: an old file is still in ``part``."""
    folder, old = part.parent, part / _OLD
    if not _is_interrupted(part):
        return True
    try:
        for name in json.loads((part / _NEW).read_bytes()):
            if Path(name).name == name and not os.path.lexists(part / name):  # it had been renamed already
                (folder / name).unlink(missing_ok=True)
        for file in old.iterdir():
            os.replace(file, folder / file.name)
        (part / _NEW).unlink()
    except (OSError, ValueError, TypeError):
        return False
    return True
