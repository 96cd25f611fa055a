"""Where many images go: a folder, or a folder behind an address, through fsspec, which is imported for such a one only.

A name in a store is a file that is there as a whole. A folder's files are written under another name and renamed. An
object store shows an object once its upload has ended; elsewhere (SFTP, HDFS, …) a file is renamed as well.
"""

from __future__ import annotations

import io
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

from ddpmx.errors import BackendError, DdpmxError, OutputError
from ddpmx.formats.atomic import atomic_write, exchange, make_folder, staging, write_synced

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
"""A scheme of at least two letters: C:// is a drive."""

_WHOLE_WHEN_UPLOADED = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "memory"}
"""Object stores: a name is there once its upload has ended, and a rename would copy."""


def is_address(target: str) -> bool:
    """Whether a target is an address such as ``s3://bucket/folder`` and not a path."""
    return _ADDRESS.match(target) is not None


def open_store(target: str) -> Store:
    """The store at a path or an address.

    Raises:
        OutputError: no folder can be made there, or fsspec refuses the address.
        BackendError: fsspec, or the package that it needs for this address, is not installed.
    """
    if not is_address(target):
        return LocalStore(Path(target))
    if target.lower().startswith("file://"):
        return LocalStore(Path(unquote(urlsplit(target).path)))
    shown = _without_secrets(target)
    try:
        import fsspec
    except ImportError as error:
        raise BackendError(
            f"{shown}: an address is written to by fsspec", note=str(error), hint="pip install 'ddpmx[remote]'"
        ) from error
    try:
        files, root = fsspec.core.url_to_fs(target)
    except ImportError as error:
        raise BackendError(
            f"{shown}: fsspec needs another package for it", note=str(error), hint="for s3://: pip install s3fs"
        ) from error
    except Exception as error:  # of any library
        raise OutputError(f"{shown}: cannot be opened", note=_first_line(error), hint="another --out") from error
    return RemoteStore(files, root, shown)


class Store(Protocol):
    """A folder of files that are whole."""

    @property
    def is_local(self) -> bool:
        """Whether to open a file costs next to nothing."""

    def names(self) -> set[str]:
        """The files that are there.

        Raises:
            OutputError: nobody can say.
        """

    def open(self, name: str) -> BinaryIO:
        """A file, for reading at any place.

        Raises:
            OutputError: it is not there, or cannot be read.
        """

    def write(self, files: Mapping[str, bytes]) -> None:
        """Write files, in place of those of the same names. Each is there as a whole, or as it was.

        Raises:
            OutputError: one could not be written.
        """


class LocalStore:
    """A folder, which is made.

    Raises:
        OutputError: it cannot be made, or written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = make_folder(folder)

    def __str__(self) -> str:
        return str(self._folder)

    @property
    def folder(self) -> Path:
        """The folder."""
        return self._folder

    @property
    def is_local(self) -> bool:
        """True."""
        return True

    def names(self) -> set[str]:
        """See :meth:`Store.names`."""
        try:
            with os.scandir(self._folder) as entries:
                return {entry.name for entry in entries if entry.is_file()}
        except OSError as error:
            raise OutputError(f"{self}: cannot be read", note=error.strerror or str(error)) from error

    def open(self, name: str) -> BinaryIO:
        """See :meth:`Store.open`."""
        try:
            return (self._folder / name).open("rb")
        except OSError as error:
            raise OutputError(f"{self._folder / name}: cannot be read", note=error.strerror or str(error)) from error

    def write(self, files: Mapping[str, bytes]) -> None:
        """See :meth:`Store.write`. Several files come all at once."""
        if len(files) == 1:
            ((name, data),) = files.items()
            with atomic_write(self._folder / name) as stream:
                stream.write(data)
            return
        with staging(self._folder, self._folder) as part:
            for name, data in files.items():
                write_synced(part / name, data)
            exchange(self._folder, part, list(files))


class RemoteStore:
    """A folder behind fsspec.

    Args:
        files: an ``fsspec.AbstractFileSystem``.
        root: the folder's path there.
        shown: its address, for people.
    """

    def __init__(self, files: Any, root: str, shown: str) -> None:
        self._files, self._root, self._shown = files, root.rstrip("/"), shown
        protocol = files.protocol
        self._renames = (
            not {protocol, *(protocol if isinstance(protocol, (tuple, list)) else ())} & _WHOLE_WHEN_UPLOADED
        )

    def __str__(self) -> str:
        return self._shown

    @property
    def is_local(self) -> bool:
        """False: each file that is opened is a request or more."""
        return False

    def names(self) -> set[str]:
        """See :meth:`Store.names`."""
        with self._errors("read", self._shown):
            self._files.invalidate_cache()  # fsspec remembers listings, and others write here too
            try:
                found = self._files.ls(self._root, detail=True)
            except FileNotFoundError:  # an object store has no empty folders
                return set()
            return {entry["name"].rsplit("/", 1)[-1] for entry in found if entry["type"] == "file"}

    def open(self, name: str) -> BinaryIO:
        """See :meth:`Store.open`. The whole file is read: its reader looks at both of its ends."""
        with self._errors("read", f"{self._shown.rstrip('/')}/{name}"):
            return io.BytesIO(self._files.cat_file(f"{self._root}/{name}"))

    def write(self, files: Mapping[str, bytes]) -> None:
        """See :meth:`Store.write`."""
        if not self._renames:
            with self._errors("written", self._shown):
                self._files.pipe({f"{self._root}/{name}": data for name, data in files.items()})  # at the same time
            return
        for name, data in files.items():
            path = f"{self._root}/{name}"
            with self._errors("written", f"{self._shown.rstrip('/')}/{name}"):
                self._files.makedirs(self._root, exist_ok=True)
                part = f"{self._root}/.{name[:40]}.ddpmx-{secrets.token_hex(8)}.part"
                try:
                    self._files.pipe_file(part, data)
                    self._files.mv(part, path)
                finally:
                    if self._files.exists(part):
                        self._files.rm_file(part)

    @contextmanager
    def _errors(self, what: str, name: str) -> Iterator[None]:
        """What fsspec's file systems raise (each those of its own library) as an OutputError."""
        try:
            yield
        except DdpmxError:
            raise
        except Exception as error:
            raise OutputError(
                f"{name}: cannot be {what}",
                note=_first_line(error),
                hint="check the address and its permissions; the same command again goes on from here",
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _without_secrets(address: str) -> str:
    """``s3://key:secret@bucket/x`` without what is before the @."""
    return re.sub(r"(://)[^/@]*@", r"\1", address)
