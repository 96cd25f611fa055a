"""Images that stay in a file as an array: an .npy, or a member of an .npz that is not compressed.

They are read by their offset and not mapped into memory: of a mapped file that is cut off meanwhile, the system kills who
reads it, while here it is an error. What was read lately is in the system's cache all the same.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import weakref
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ddpm_export.training.images.pixels import Pixels
from ddpmx.errors import DataError, FileFormatError
from ddpmx.formats.npz import MAX_MEMBERS, read_npy_header

PIECE, PIECES = 4096, 1024
"""What is read of a file to know it again: so many pieces of so many bytes."""

_LOCAL = struct.Struct("<4s5H3I2H")
"""The header before each member of a zip archive (PKWARE's APPNOTE 4.3.7)."""


@dataclass(frozen=True)
class Slot:
    """An array in a file.

    Attributes:
        path: the file.
        shape: of the array.
        dtype: of the array.
        fortran: whether the first index varies fastest.
        offset: where its numbers begin; None in a compressed member.
        crc: CRC-32 of header and numbers, from the archive's directory; None of an .npy.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    fortran: bool
    offset: int | None
    crc: int | None = None

    @property
    def ndim(self) -> int:
        """The number of sides."""
        return len(self.shape)

    @property
    def in_parts(self) -> bool:
        """Whether single images can be read out of it."""
        return self.offset is not None and self.dtype == np.uint8 and not self.fortran

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        size = self.dtype.itemsize
        for side in self.shape:
            size *= side
        return size


def slot_of_npy(path: Path) -> Slot:
    """What the header of an .npy says of its array.

    Raises:
        FileFormatError: it is none, it holds objects, or it is cut off.
    """
    try:
        with path.open("rb") as stream:
            shape, fortran, dtype = read_npy_header(stream)
            offset = stream.tell()
            slot, there = Slot(path, shape, dtype, fortran, offset), stream.seek(0, os.SEEK_END) - offset
    except Exception as error:  # numpy's parser of headers may raise anything on a damaged one
        raise FileFormatError(f"{path}: not a valid .npy file", note=str(error)[:200] or None) from error
    if dtype.hasobject:
        raise FileFormatError(f"{path}: not a valid .npy file", note="it holds objects, not plain numbers")
    if there != slot.nbytes:
        raise FileFormatError(
            f"{path}: not a valid .npy file",
            note=f"{list(shape)} of {dtype} take {slot.nbytes:,} bytes, and there are {there:,}",
        )
    return slot


def slots_of_npz(path: Path) -> dict[str, Slot]:
    """The arrays of an .npz by name, of which only the headers are read.

    Raises:
        FileFormatError: it is none, holds objects, or its parts are not where it says.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as stream:
            length = os.fstat(stream.fileno()).st_size
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
            if len(entries) > MAX_MEMBERS:
                raise ValueError(f"it has {len(entries)} parts")
            return {
                entry.filename.removesuffix(".npy"): _slot(path, archive, entry, stream, length) for entry in entries
            }
    except Exception as error:  # zipfile, zlib and numpy's parser raise anything on damaged archives
        raise FileFormatError(f"{path}: not a valid .npz file", note=str(error)[:200] or None) from error


def _slot(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, stream: BinaryIO, length: int) -> Slot:
    with archive.open(entry) as member:
        shape, fortran, dtype = read_npy_header(member)
        header = member.tell()
    slot = Slot(path, shape, dtype, fortran, None, entry.CRC)
    if dtype.hasobject:
        raise ValueError(f"{entry.filename} holds objects, not plain numbers")
    if slot.nbytes != entry.file_size - header:
        raise ValueError(f"{entry.filename} does not hold {list(shape)} of {dtype}")
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        return slot
    stream.seek(entry.header_offset)
    signature, *_, name, extra = _LOCAL.unpack(stream.read(_LOCAL.size))
    offset = entry.header_offset + _LOCAL.size + name + extra + header
    if signature != b"PK\x03\x04" or offset + slot.nbytes > length:
        raise ValueError(f"{entry.filename} is not where the archive says")
    return Slot(path, shape, dtype, fortran, offset, entry.CRC)


class OnDisk(Pixels):
    """uint8 images in a file.

    Args:
        slot: uint8, not of Fortran's order, with an offset: [N, H, W], [N, H, W, C] or [N, C, H, W].
        channels_first: whether it is [N, C, H, W].
        identity: in place of the pixels, for which the whole file would be read.
    """

    def __init__(self, slot: Slot, *, channels_first: bool = False, identity: bytes | None = None) -> None:
        if not slot.in_parts:
            raise ValueError("not an array of bytes that can be read in parts")
        self.slot, self._channels_first, self.identity = slot, channels_first, identity
        self._image = slot.shape[1:] if len(slot.shape) == 4 else (*slot.shape[1:], 1)
        self._bytes = slot.nbytes // max(1, slot.shape[0])
        self._stream = slot.path.open("rb", buffering=0)
        weakref.finalize(self, self._stream.close)
        self._lock = threading.Lock()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, C)."""
        one, two, three = self._image
        return (self.slot.shape[0], two, three, one) if self._channels_first else (self.slot.shape[0], one, two, three)

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The images of these numbers.

        Raises:
            DataError: the file has become shorter, or cannot be read.
        """
        indices = np.asarray(indices)
        if len(indices) and not (indices.min() >= 0 and indices.max() < self.slot.shape[0]):
            raise IndexError(f"of {self.slot.shape[0]} images, from {indices.min()} to {indices.max()}")
        images = np.empty((len(indices), *self._image), np.uint8)
        for image, index in zip(images, indices.tolist(), strict=True):
            self._read(memoryview(image).cast("B"), (self.slot.offset or 0) + index * self._bytes)
        return np.ascontiguousarray(images.transpose(0, 2, 3, 1)) if self._channels_first else images

    def _read(self, into: memoryview, offset: int) -> None:
        """Fill ``into`` with the bytes from ``offset`` on.

        Raises:
            DataError: they are not there.
        """
        done = 0
        try:
            while done < len(into):
                with self._lock:  # seeking and reading are two calls
                    self._stream.seek(offset + done)
                    count = self._stream.readinto(into[done:])
                if not count:
                    raise OSError("it ends before this image")
                done += count
        except OSError as error:
            raise DataError(
                f"{self.slot.path}: images can no longer be read",
                note=error.strerror or str(error),
                hint="put the file back as it was, and --resume",
            ) from error


def identity_of(slot: Slot) -> bytes:
    """What an array is known by if that is not all its bytes: in an .npz its checksum, in an .npy pieces of it.

    The pieces lie at equal distances, the first and the last among them.

    An .npy that was changed all over is noticed, and so are its first and last bytes. If a few images were exchanged in the
    middle, that is not, unless it is an .npz, whose checksum is over every byte.

    Raises:
        DataError: the file cannot be read.
    """
    digest = hashlib.sha256(repr((slot.shape, slot.dtype.str)).encode())
    if slot.crc is not None:
        digest.update(b"crc32 %d" % slot.crc)
        return digest.digest()
    size = slot.nbytes
    length = min(PIECE, size)
    count = min(PIECES, -(-size // length))  # all of it, if it is small
    try:
        with slot.path.open("rb") as stream:
            for number in range(count):
                stream.seek((slot.offset or 0) + (size - length) * number // max(1, count - 1))
                digest.update(stream.read(length))
    except OSError as error:
        raise DataError(f"{slot.path}: images can no longer be read", note=error.strerror or str(error)) from error
    return digest.digest()
