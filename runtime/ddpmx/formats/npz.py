""".npz files of unknown origin: nothing is unpickled, and no more is allocated than the archive really holds."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ddpmx.errors import FileFormatError

MAX_MEMBERS = 256


def read_npz(
    path: str | os.PathLike[str], *, max_bytes: int, kinds: str = "biufc", besides: Collection[str] = ()
) -> dict[str, NDArray[Any]]:
    """Every array of an .npz, by name.

    Args:
        path: the archive.
        max_bytes: the most that it may unpack to.
        kinds: the kinds of dtype that it may hold (``dtype.kind``); objects are always refused.
        besides: arrays that are neither read nor counted.

    Raises:
        FileFormatError: damaged, too large, or holds anything but arrays of these kinds.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block, reading a device might never end
            raise FileFormatError(f"{path}: cannot be read", note="not a file")
        with zipfile.ZipFile(path) as archive:
            left = {f"{name}.npy" for name in besides}
            entries = [entry for entry in archive.infolist() if not entry.is_dir() and entry.filename not in left]
            size = sum(entry.file_size for entry in entries)
            if size > max_bytes or len(entries) > MAX_MEMBERS:
                raise FileFormatError(
                    f"{path}: unpacks to {size / 2**20:.0f} MiB in {len(entries)} parts",
                    note=f"the limits are {max_bytes / 2**20:.0f} MiB and {MAX_MEMBERS}",
                )
            arrays = [
                entry for entry in entries if entry.filename.endswith(".npy")
            ]  # there may be others, such as a LICENSE
            return {entry.filename.removesuffix(".npy"): _member(archive, entry, kinds) for entry in arrays}
    except FileFormatError:
        raise
    except Exception as error:  # a damaged archive raises anything that zipfile, zlib or numpy's header parser may
        raise FileFormatError(f"{path}: not a valid .npz file", note=str(error)[:200] or None) from error


def read_npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the first index varies fastest, and dtype, from the header of an .npy; its numbers come next.

    Raises:
        ValueError: it is none, of another version, or of a negative size. NumPy's parser may raise other exceptions.
    """
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"the array has the unknown version {version}")
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read_header(stream, max_header_size=10_000)
    if any(side < 0 for side in shape):
        raise ValueError(f"an array of the shape {list(shape)}")
    return shape, fortran, dtype


def _member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, kinds: str) -> NDArray[Any]:
    with archive.open(entry) as stream:
        shape, fortran, dtype = read_npy_header(stream)
        if dtype.hasobject or dtype.kind not in kinds:
            raise ValueError(f"{entry.filename} holds {dtype}, not plain numbers")
        wanted = dtype.itemsize
        for side in shape:
            wanted *= int(side)
        if wanted > entry.file_size:
            raise ValueError(f"{entry.filename} is truncated: it is too small for {list(shape)} of {dtype}")
        data = bytearray()  # grows with what is really there; an array on it is writable
        while chunk := stream.read(max(0, min(1 << 20, wanted - len(data)))):
            data += chunk
        if len(data) != wanted or stream.read(1):
            raise ValueError(f"{entry.filename} does not hold {list(shape)} of {dtype}")
    array = np.frombuffer(data, dtype)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
