"""The pixels of a folder, kept beside a run's checkpoints so that resuming it decodes nothing.

One file for a run: ``images-cache.npz`` with ``images``, uint8 [N, H, W, C], and ``about``, JSON as bytes; it is not
compressed, so that images which do not fit into memory are read out of it one by one. It counts only while every file has
the size and the times that it had, and the settings are the same; anything else is read again. It may be deleted at any
time, except while a training reads from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import PIL
from numpy.lib import format as npy
from numpy.typing import NDArray

from ddpm_export.training.images.items import Item
from ddpm_export.training.images.on_disk import OnDisk, slots_of_npz
from ddpm_export.training.images.pixels import InMemory, Pixels
from ddpm_export.training.images.source import Source
from ddpmx.errors import FileFormatError, OutputError, SpecError
from ddpmx.formats.atomic import atomic_write
from ddpmx.formats.envelope import parse_json
from ddpmx.formats.npz import read_npz

NAME = "images-cache.npz"
CONDITIONS = "conditions-cache.npz"
"""The same for condition images, if they do not fit into memory."""

MAX_BYTES = 2 << 30
"""Of images that fit into memory, more pixels are not cached."""

_MAX_ABOUT = 1 << 24


@dataclass(frozen=True)
class Kept:
    """What a cache holds.

    Attributes:
        pixels: the images.
        notes: what was said about them.
        skipped: the names of files that could not be read.
    """

    pixels: Pixels
    notes: tuple[str, ...]
    skipped: frozenset[str] = frozenset()


def key_of(source: Source, items: Sequence[Item], containers: Sequence[Path] = ()) -> str:
    """A hash of everything on which the pixels depend: the settings, Pillow, and each file's name, size and times.

    Args:
        source: the settings.
        items: the images.
        containers: the files in which images lie that are no files.
    """
    settings = source.images_alone().to_json()
    del settings["path"]
    settings.pop("identity", None)
    digest = hashlib.sha256(json.dumps([PIL.__version__, settings]).encode())
    root = source.path if source.path.is_dir() else source.path.parent
    for file in (*containers, *items):
        if not isinstance(file, Path):
            digest.update(file.stamp() + b"\n")
            continue
        try:
            status = os.stat(file)
        except OSError:
            continue  # reading it says what is wrong
        line = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} "
        digest.update(line.encode() + os.fsencode(file.relative_to(root)) + b"\n")
    return digest.hexdigest()


def load(file: Path, key: str, limit: int | None = None) -> Kept | None:
    """The images and what was said about them, or None if there is no cache with that key, or it is damaged.

    Args:
        file: the cache.
        key: of the images that are wanted.
        limit: more bytes of pixels than this are left in the file. Then their checksum is not compared.
    """
    try:
        if not file.is_file():
            return None
        slots = slots_of_npz(file)
        images = slots["images"]
        if images.dtype != np.uint8 or len(images.shape) != 4 or slots["about"].nbytes > _MAX_ABOUT:
            return None
        stays = limit is not None and images.nbytes > limit
        if stays:
            with zipfile.ZipFile(file) as archive, archive.open("about.npy") as stream:
                about = parse_json(np.asarray(npy.read_array(stream, allow_pickle=False), np.uint8).tobytes())
            pixels: Pixels = OnDisk(images)
        else:
            arrays = read_npz(file, max_bytes=images.nbytes + 2 * _MAX_ABOUT, kinds="u")
            about, pixels = parse_json(arrays["about"].tobytes()), InMemory(arrays["images"])
        if not isinstance(about, dict) or about["key"] != key:
            return None
        return Kept(pixels, tuple(map(str, about["notes"])), frozenset(map(str, about.get("skipped", ()))))
    except (FileFormatError, SpecError, KeyError, TypeError, ValueError, AttributeError, OSError, zipfile.BadZipFile):
        return None


def store(folder: Path, key: str, images: NDArray[np.uint8], notes: Sequence[str]) -> None:
    """Write the cache into an existing folder, unless it is there or would be too large. A full disk is no error."""
    file = folder / NAME
    if images.nbytes > MAX_BYTES or load(file, key, MAX_BYTES) is not None:
        return
    with contextlib.suppress(OutputError), _written(file, images.shape, _about(key, notes, ())) as stream:
        stream.write(np.ascontiguousarray(images).data)


def write(
    file: Path,
    key: str,
    shape: tuple[int, int, int, int],
    images: Iterable[NDArray[np.uint8]],
    notes: Sequence[str],
    skipped: Sequence[str] = (),
) -> None:
    """Write a cache of images that do not fit into memory, one after another.

    Args:
        file: where.
        key: of the images.
        shape: (N, H, W, C).
        images: the N images.
        notes: what was said about them.
        skipped: the names of files that could not be read.

    Raises:
        OutputError: there is no room for it, or it cannot be written. Nothing is left behind.
    """
    needed, free = math.prod(shape), shutil.disk_usage(file.parent).free
    if needed > free:  # known now, and not after hours of decoding
        raise OutputError(
            f"{file}: no room for {needed / 2**30:.1f} GiB of pixels",
            note=f"{free / 2**30:.1f} GiB are free there",
            hint="--out on another disk, a smaller --size, or --no-cache, which decodes images whenever they are taken",
        )
    with _written(file, shape, _about(key, notes, skipped)) as stream:
        for image in images:
            stream.write(np.ascontiguousarray(image).data)


def _about(key: str, notes: Sequence[str], skipped: Sequence[str]) -> bytes:
    return json.dumps({"key": key, "notes": list(notes), "skipped": list(skipped)}).encode()[:_MAX_ABOUT]


@contextlib.contextmanager
def _written(file: Path, shape: tuple[int, ...], about: bytes) -> Iterator[IO[bytes]]:
    """Write the cache; the block writes the pixels."""
    with atomic_write(file) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("about.npy", "w") as member:
            npy.write_array(member, np.frombuffer(about, np.uint8), allow_pickle=False)
        with archive.open("images.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": tuple(map(int, shape))}
            npy.write_array_header_1_0(member, header)
            yield member
