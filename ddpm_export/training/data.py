"""Image folders and .npz files → uint8 [N, H, W, C], checked before training begins."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_export.training.images.folder import MAX_BYTES, read_folder
from ddpm_export.training.images.source import WHITE, Source
from ddpmx.errors import DataError, FileFormatError, InputError
from ddpmx.formats.npz import read_npz

__all__ = ["WHITE", "Dataset", "Source", "load_dataset"]

_CHANNELS = (1, 3, 4)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images in memory.

    Attributes:
        images: uint8 [N, H, W, C].
        source: where they came from.
        notes: what a user should know before training: files left out, how transparency and numbers were read.
        cache_key: of a folder's images, see :mod:`.images.cache`.
    """

    images: NDArray[np.uint8]
    source: Source
    notes: tuple[str, ...] = ()
    cache_key: str | None = None

    def __len__(self) -> int:
        """The number of images."""
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, height, width, channels = self.images.shape
        return channels, height, width

    def fingerprint(self) -> str:
        """A hash of shape and pixels, to check that a resumed run has the images that it began with."""
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        return digest.hexdigest()


def load_dataset(
    path: str | os.PathLike[str],
    *,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    background: tuple[int, int, int] | None = None,
    white: float | None = None,
    max_pixels: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Read a folder of images (with its subfolders and the folders linked there) or an ``.npz``.

    Args:
        path: a folder, or an ``.npz`` with one array of images: [N, H, W], [N, H, W, C] or [N, C, H, W], uint8, or with
            ``white`` any whole numbers or floats from 0 on.
        size: (H, W) to bring every image to: the largest centred part of that shape, resized. Folders only.
        channels: 1, 3 or 4, to convert every image to grey, RGB or RGBA. Folders only.
        background: the colour (R, G, B), 0…255, behind transparent pixels of images without a channel for it. White by
            default. Folders only.
        white: the number that is white, in greys of more than 8 bits and in an ``.npz``. Greys of 16 bits may do without:
            white is then the full scale of 8, 10, 12, 14 or 16 bits, by the largest number in all images.
        max_pixels: the largest H·W of a file, 178,956,970 by default. Folders only.
        progress: called with (images read, images in all).

    Raises:
        DataError: nothing is there; files cannot be read as images, all of which are named; or the images have different
            sizes or modes and ``size`` or ``channels`` is None.
        InputError: an argument is out of its range, or has no effect on these images.
    """
    source = Source(Path(path), size, channels, WHITE if background is None else background, white)
    if max_pixels is not None:
        source = replace(source, max_pixels=max_pixels)
    if not os.path.isdir(path) and any(setting is not None for setting in (size, channels, background, max_pixels)):
        source.check()
        _check_npz(source.path)
        raise InputError(
            "size, channels, background and max_pixels change images in a folder; an .npz is taken as it is",
            hint="without them, or a folder of images",
        )
    dataset = load_source(source, progress=progress)
    if white is not None and dataset.source.white is None:
        raise InputError(
            "--white has no effect: no image is a grey of more than 8 bits that leaves its white open", hint="omit it"
        )
    if background is not None and dataset.shape[0] == 4:
        raise InputError(
            "--background has no effect on images of four channels, which keep their transparency",
            hint="--channels 3 (or 1) puts them on it",
        )
    return dataset


def load_source(
    source: Source, *, progress: Callable[[int, int], None] | None = None, cached: Path | None = None
) -> Dataset:
    """Read images as ``source`` says: a run's own, which are read as they were when it began.

    Args:
        source: where they are, and how to read them.
        progress: called with (images read, images in all).
        cached: the cache that a run may have of a folder, see :mod:`.images.cache`.

    Raises:
        DataError, InputError: as :func:`load_dataset`.
    """
    source.check()
    if os.path.isdir(source.path):
        read = read_folder(source, progress, cached)
        return Dataset(read.images, read.source, read.notes, read.key)
    _check_npz(source.path)
    images, white, note = _read_npz(source.path, source.white)
    return Dataset(images, replace(source, white=white), () if note is None else (note,))


def _check_npz(path: Path) -> None:
    """Check that ``path`` has the name of an ``.npz`` and is a file.

    Raises:
        DataError: it is not.
    """
    if not os.path.exists(path):
        raise DataError(f"{path}: there is no such file or folder", hint="--data takes a folder of images or an .npz")
    if path.suffix.lower() != ".npz" or not path.is_file():
        raise DataError(f"{path}: neither a folder nor an .npz", hint="--data takes a folder of images or an .npz")


def _read_npz(path: Path, white: float | None) -> tuple[NDArray[np.uint8], float | None, str | None]:
    """The images of an .npz, the number that was read as white, and a line about it; both None for uint8 as it is."""
    try:
        arrays = read_npz(path, max_bytes=MAX_BYTES, kinds="biufcSUMmV")  # labels may be text
    except FileFormatError as error:
        raise DataError(error.fact, note=error.note, hint="made with numpy.savez(path, images=…)?") from error
    images = [name for name, array in arrays.items() if array.ndim in (3, 4)]
    if len(images) != 1:
        listing = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items()) or "nothing"
        raise DataError(
            f"{path}: {'more than one array' if images else 'no array'} of images in it",
            note=f"it holds {listing}"[:300],
            hint="one array [N, H, W], [N, H, W, C] or [N, C, H, W], any name",
        )
    array, note = arrays[images[0]], None
    if array.dtype != np.uint8 or white is not None:  # 0 and 1, say, may be uint8 as well
        numbers, array = array, _to_8_bits(array, white, f"{path}: {images[0]!r}")
        beyond = "; what is larger is white too" if numbers.max() > (white or 0) else ""
        note = (
            f"{images[0]!r} is {numbers.dtype}: numbers from {numbers.min():g} to {numbers.max():g}, "
            f"white is {white or 0:g}{beyond} (--white sets it)"
        )
    if array.ndim == 3 and array.shape[-1] in (3, 4):
        raise DataError(
            f"{path}: {images[0]!r} is [{', '.join(map(str, array.shape))}]: one image, or many of that width?",
            hint="images[None] for one image, images[..., None] for many",
        )
    if array.ndim == 3:
        array = array[..., None]
    elif array.shape[-1] not in _CHANNELS and array.shape[1] in _CHANNELS:
        array = array.transpose(0, 2, 3, 1)
    if array.shape[-1] not in _CHANNELS or 0 in array.shape:
        raise DataError(
            f"{path}: {images[0]!r} has the shape {list(array.shape)}", hint="N images of 1, 3 or 4 channels"
        )
    return np.ascontiguousarray(array), white, note


def _to_8_bits(array: NDArray[Any], white: float | None, what: str) -> NDArray[np.uint8]:
    """Numbers from 0 to ``white`` as 0…255: 255·v/white, rounded.

    Raises:
        DataError: ``white`` is unknown, or there are numbers below 0, NaN or infinities.
    """
    span = f"numbers from {array.min():g} to {array.max():g}" if array.size and array.dtype.kind in "iuf" else None
    if span is not None and not (array.min() >= 0 and np.isfinite(array.max())):
        raise DataError(
            f"{what} holds numbers below 0, NaN or infinities",
            note=span,
            hint="save 0…255 as uint8, or numbers from 0 on and name white by --white",
        )
    if white is None or span is None:
        raise DataError(
            f"{what} is {array.dtype}, not uint8",
            note=span,
            hint="--white N (ddpmx train), the number that is white (black is 0); or save 0…255 as uint8"
            if span
            else "save uint8",
        )
    levels = np.empty(array.shape, np.uint8)
    for image, level in zip(array, levels, strict=True):  # one by one: the whole as float64 would take 8 times as much
        level[...] = np.minimum(np.floor(image.astype(np.float64) * (255 / white) + 0.5), 255)
    return levels
