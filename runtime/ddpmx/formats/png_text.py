"""The text in a PNG (chunks tEXt and iTXt), read without decoding the picture."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

from ddpmx.errors import FileFormatError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_TEXT, MAX_CHUNKS = 1 << 16, 1 << 16
"""Bytes of one text, and chunks of a file. What ddpmx writes is far below."""


def is_png(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as a PNG does. False if it cannot be read."""
    try:
        if not Path(path).is_file():
            return False
        with Path(path).open("rb") as stream:
            return stream.read(len(SIGNATURE)) == SIGNATURE
    except OSError:
        return False


def read_png_text(path: str | os.PathLike[str]) -> tuple[tuple[int, int], dict[str, str]]:
    """The size (H, W) in pixels of a PNG, and its texts by keyword. Compressed and very long texts are left out.

    Raises:
        FileFormatError: unreadable, no PNG, or damaged.
    """
    try:
        with Path(path).open("rb") as stream:
            return png_text(stream)
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read", note=error.strerror or str(error)) from error
    except ValueError as error:
        raise FileFormatError(f"{path}: not a valid PNG", note=str(error)) from error


def png_text(stream: BinaryIO) -> tuple[tuple[int, int], dict[str, str]]:
    """:func:`read_png_text` of an open file.

    Raises:
        ValueError: no PNG, or damaged, or cut short.
    """
    if stream.read(len(SIGNATURE)) != SIGNATURE:
        raise ValueError("no PNG")
    size: tuple[int, int] | None = None
    texts: dict[str, str] = {}
    for _ in range(MAX_CHUNKS):
        length, kind = struct.unpack(">I4s", _exactly(stream, 8))
        if kind == b"IEND":
            break
        if kind not in (b"IHDR", b"tEXt", b"iTXt") or length > MAX_TEXT:
            stream.seek(length + 4, os.SEEK_CUR)
            continue
        data = _exactly(stream, length)
        if struct.unpack(">I", _exactly(stream, 4))[0] != zlib.crc32(kind + data):
            raise ValueError("a chunk has the wrong CRC")
        if kind == b"IHDR":
            if length != 13:
                raise ValueError("its header has the wrong length")
            width, height = struct.unpack(">II", data[:8])
            size = height, width
            continue
        keyword, _, rest = data.partition(b"\0")
        if kind == b"tEXt":
            texts[keyword.decode("latin-1")] = rest.decode("latin-1")
        elif rest[:1] == b"\0":  # iTXt, not compressed: flag, method, language, translated keyword, text
            texts[keyword.decode("latin-1")] = rest[2:].split(b"\0", 2)[-1].decode("utf-8", "replace")
    if size is None:
        raise ValueError("it does not say its size")
    return size, texts


def _exactly(stream: BinaryIO, count: int) -> bytes:
    """The next bytes. Raises ValueError if the file ends before."""
    data = stream.read(count)
    if len(data) < count:
        raise ValueError("it is cut short")
    return data
