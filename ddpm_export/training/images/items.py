"""An image that is a file, or lies inside one: a member of a tar, a cell of a table."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

END_BYTES = 4096
"""So much of the beginning and of the end of an image's file says which it is, see :func:`ends_of`."""


@runtime_checkable
class Inside(Protocol):
    """An image inside a file. It can be hashed, and equals only itself."""

    @property
    def name(self) -> str:
        """What it is called in messages. Never used as a path."""

    @property
    def stem(self) -> str:
        """Its name without what stands for the kind of file, by which images and conditions are paired."""

    def open(self) -> BinaryIO:
        """Its bytes, from the first on.

        Raises:
            OSError: they are no longer there.
        """

    def stamp(self) -> bytes:
        """Where it lies in its file."""


Item = Path | Inside


def name_of(item: Item, folder: Path) -> str:
    """What an image is called in messages about ``folder``."""
    return str(item.relative_to(folder)) if isinstance(item, Path) else item.name


def stem_of(item: Item, folder: Path) -> str:
    """An image's name below ``folder`` without its suffix."""
    return item.relative_to(folder).with_suffix("").as_posix() if isinstance(item, Path) else item.stem


def suffix_of(item: Item) -> str:
    """The suffix in small letters."""
    return Path(item.name).suffix.lower()


def ends_of(item: Item, folder: Path) -> bytes:
    """Name, size, and the bytes at both ends: enough to notice that an image was exchanged, without reading it whole.

    Compressed images differ at their ends in practice: a header with sizes and tables at one, the end of the entropy code
    or a checksum at the other. Times of files are left out, since a copy of a data set is the same data set.
    """
    name = os.fsencode(item.relative_to(folder)) if isinstance(item, Path) else item.name.encode()
    with item.open("rb") if isinstance(item, Path) else item.open() as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        first = stream.read(END_BYTES)
        stream.seek(max(len(first), size - END_BYTES))
        return b"%d:%b:%d:" % (len(name), name, size) + first + stream.read(END_BYTES)
