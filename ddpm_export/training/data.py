"""Image folders and .npz files → uint8 [N, H, W, C], checked before training begins."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from ddpmx.errors import DataError, FileFormatError, InputError
from ddpmx.formats.npz import read_npz

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
MAX_BYTES = 8 << 30
"""All images are kept in memory as uint8, up to this much."""

_CHANNELS = {"1": 1, "L": 1, "LA": 4, "P": 3, "RGB": 3, "RGBA": 4, "CMYK": 3, "YCbCr": 3}
_GREY_16 = frozenset({"I;16", "I;16B", "I;16L", "I;16N"})
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class Source:
    """Where images came from: the arguments of :func:`load_dataset`."""

    path: Path
    size: tuple[int, int] | None = None
    channels: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the path is absolute."""
        return {"path": str(self.path.resolve()), "size": self.size, "channels": self.channels}

    @classmethod
    def from_json(cls, values: Any, where: str) -> Source:
        """The source from the values of :meth:`to_json`.

        Raises:
            FileFormatError: the values are not of that form; the error names ``where``.
        """
        try:
            size, channels = values["size"], values["channels"]
            assert channels is None or type(channels) is int
            return cls(Path(values["path"]), None if size is None else (int(size[0]), int(size[1])), channels)
        except (KeyError, TypeError, ValueError, OverflowError, IndexError, AssertionError) as error:
            raise FileFormatError(f"{where}: the images it was trained on are not recorded") from error


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images in memory.

    Attributes:
        images: uint8 [N, H, W, C].
        source: where they came from.
    """

    images: NDArray[np.uint8]
    source: Source

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
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Read a folder of images (with its subfolders) or an ``.npz``.

    Args:
        path: a folder, or an ``.npz`` with one array of uint8 images: [N, H, W], [N, H, W, C] or [N, C, H, W].
        size: (H, W) to bring every image to: the largest centred part of that shape, resized. Folders only.
        channels: 1, 3 or 4, to convert every image to grey, RGB or RGBA. Folders only.
        progress: called with (images read, images in all).

    Raises:
        DataError: nothing is there, a file is not an image, or the images have different sizes or modes and ``size`` or
            ``channels`` is None.
        InputError: ``size`` or ``channels`` out of range, or given for an ``.npz``.
    """
    path = Path(path)
    if channels not in (None, 1, 3, 4):
        raise InputError(f"channels must be 1 (grey), 3 (RGB) or 4 (RGBA), not {channels!r}")
    if size is not None and not all(1 <= side <= 65536 for side in size):
        raise InputError(f"a size is two whole numbers from 1 to 65536, not {size!r}")
    if os.path.isdir(path):
        return Dataset(_read_folder(path, size, channels, progress), Source(path, size, channels))
    if not os.path.exists(path):
        raise DataError(f"{path}: there is no such file or folder", hint="--data takes a folder of images or an .npz")
    if path.suffix.lower() != ".npz" or not path.is_file():
        raise DataError(f"{path}: neither a folder nor an .npz", hint="--data takes a folder of images or an .npz")
    if size is not None or channels is not None:
        raise InputError("size and channels change images in a folder; an .npz is taken as it is")
    return Dataset(_read_npz(path), Source(path))


def _read_npz(path: Path) -> NDArray[np.uint8]:
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
    array = arrays[images[0]]
    if array.dtype != np.uint8:
        raise DataError(
            f"{path}: {images[0]!r} is {array.dtype}, not uint8",
            hint="save 0…255 as uint8: the file does not show whether floats run from 0 or from −1",
        )
    if array.ndim == 3 and array.shape[-1] in (3, 4):
        raise DataError(
            f"{path}: {images[0]!r} is [{', '.join(map(str, array.shape))}]: one image, or many of that width?",
            hint="images[None] for one image, images[..., None] for many",
        )
    if array.ndim == 3:
        array = array[..., None]
    elif array.shape[-1] not in _MODES and array.shape[1] in _MODES:
        array = array.transpose(0, 2, 3, 1)
    if array.shape[-1] not in _MODES or 0 in array.shape:
        raise DataError(
            f"{path}: {images[0]!r} has the shape {list(array.shape)}", hint="N images of 1, 3 or 4 channels"
        )
    return np.ascontiguousarray(array)


def _read_folder(
    folder: Path,
    size: tuple[int, int] | None,
    channels: int | None,
    progress: Callable[[int, int], None] | None,
) -> NDArray[np.uint8]:
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and not file.is_dir()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not files:
        raise DataError(f"{folder}: no images in this folder", hint=f"it reads {', '.join(sorted(SUFFIXES))}")
    if size is None or channels is None:  # headers show both, before anything is decoded
        headers = [_header(file) for file in files]
        if size is None:
            sizes = Counter((height, width) for height, width, _ in headers)
            if len(sizes) > 1:
                common = ", ".join(f"{n} of {h}×{w}" for (h, w), n in sizes.most_common(3))
                raise DataError(
                    f"{folder}: the images have {len(sizes)} different sizes",
                    note=f"height × width: {common}{', …' if len(sizes) > 3 else ''}",
                    hint="--size 64 (or 64x48, height first) crops and resizes them all",
                )
            size = next(iter(sizes))
        if channels is None:
            modes = Counter(mode for *_, mode in headers)
            counts = {1 if mode in _GREY_16 else _CHANNELS.get(mode, 3) for mode in modes}
            if len(counts) > 1:
                common = ", ".join(f"{n} {mode}" for mode, n in modes.most_common(4))
                raise DataError(
                    f"{folder}: the images have different modes",
                    note=common,
                    hint="--channels 1 (grey), 3 (RGB) or 4 (RGBA) converts them all",
                )
            channels = counts.pop()
    total = len(files) * size[0] * size[1] * channels
    if total > MAX_BYTES:
        raise DataError(
            f"{folder}: {len(files)} images of {size[0]}×{size[1]} take {total / 2**30:.1f} GiB",
            note=f"all are kept in memory, up to {MAX_BYTES / 2**30:.0f} GiB",
            hint="a smaller --size, or fewer images",
        )
    images = np.empty((len(files), *size, channels), np.uint8)
    for index, file in enumerate(files):
        images[index] = _read_image(file, size, channels)
        if progress is not None:
            progress(index + 1, len(files))
    return images


def _header(file: Path) -> tuple[int, int, str]:
    """(height, width, mode) of an image file."""
    try:
        with _open(file) as image:
            width, height = image.size
            if image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):  # rotated by 90 degrees
                width, height = height, width
            return height, width, _grey_16(image) or ("RGBA" if image.has_transparency_data else image.mode)
    except Exception as error:
        raise _unreadable(file, error) from error


def _open(file: Path) -> Image.Image:
    """Open an image of a common format; for some others Pillow starts external programs."""
    if not file.is_file():  # reading a pipe could block
        raise ValueError("not a regular file")
    return Image.open(file, formats=FORMATS)


def _grey_16(image: Image.Image) -> str | None:
    """The mode, if it is grey of 16 bits. Older versions of Pillow open such PNGs as 32-bit integers."""
    return "I;16" if image.mode in _GREY_16 or (image.mode == "I" and image.format == "PNG") else None


def _read_image(file: Path, size: tuple[int, int], channels: int) -> NDArray[np.uint8]:
    height, width = size
    try:
        with _open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if _grey_16(opened):  # Pillow's own conversion clips everything above 255
                picture = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise ValueError(f"mode {image.mode} does not define which number is white; save 8 or 16 bits")
            else:
                picture = image
            picture = picture.convert(_MODES[channels])
    except Exception as error:  # decoders can raise anything on damaged files
        raise _unreadable(file, error) from error
    if (picture.height, picture.width) != (height, width):
        scale = max(height / picture.height, width / picture.width)
        crop_h, crop_w = min(picture.height, height / scale), min(picture.width, width / scale)
        left, top = (picture.width - crop_w) / 2, (picture.height - crop_h) / 2
        picture = picture.resize((width, height), Image.Resampling.LANCZOS, (left, top, left + crop_w, top + crop_h))
    return np.asarray(picture, np.uint8).reshape(height, width, channels)


def _unreadable(file: Path, error: Exception) -> DataError:
    return DataError(
        f"{file}: not an image that can be read",
        note=str(error)[:200],
        hint="remove it from the folder, or replace it",
    )
