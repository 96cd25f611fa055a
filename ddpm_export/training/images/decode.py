"""One image file → uint8 [H, W, C]."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError, features

from ddpm_export.training.images.items import Item
from ddpm_export.training.images.source import Source
from ddpmx.errors import DdpmxError
from ddpmx.images.resize import resized

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
PLUGINS = {"AVIF": "pillow>=11.3", "HEIF": "pillow-heif"}
"""Formats that are read if they can be, from reading 3 on, and what has to be installed for that."""

CHANNELS = {"1": 1, "L": 1, "LA": 4, "P": 3, "RGB": 3, "RGBA": 4, "CMYK": 3, "YCbCr": 3, "I;16": 1, "I": 1, "F": 1}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


_GREY_16 = frozenset({"I;16", "I;16B", "I;16L", "I;16N"})
_ROTATED = (5, 6, 7, 8)
"""The values of Exif's orientation that exchange height and width."""

_LARGE = 32_000_000
_limit_lock = threading.Lock()
_limit_users = 0
_limit: int | None = None
_one_at_a_time = threading.Lock()
"""Held while an image of more than :data:`_LARGE` pixels is in memory: one takes up to a gigabyte."""


@dataclass(frozen=True)
class Header:
    """What a file says of its image before anything is decoded.

    Attributes:
        height, width: as it is looked at, turned by its Exif orientation. Of a PNG, which says that only when it is
            decoded, not turned if ``source.size`` makes it needless.
        mode: Pillow's; ``I;16`` for every grey of 16 bits, and ``RGBA`` for whatever has transparent parts.
        transparent: whether pixels may be transparent.
        wide_colour: colours of 16 bits, of which Pillow keeps the upper 8.
        frames: whether there are more images in it; the first is read.
        wide_grey: grey of more than 8 bits, in a file that does not say which number is white.
    """

    height: int
    width: int
    mode: str
    transparent: bool
    wide_colour: bool
    frames: bool
    wide_grey: bool


class Unreadable(Exception):  # noqa: N818 - what is wrong with one file of many; the folder's error names them all
    """A file is no image that can be read.

    Attributes:
        megapixels: its size, if only that is in the way.
    """

    def __init__(self, reason: str, *, megapixels: int | None = None) -> None:
        super().__init__(reason)
        self.megapixels = megapixels


def read_header(file: Item, source: Source) -> Header:
    """The header of an image file.

    Raises:
        Unreadable: it is none.
    """
    with _opened(file, source) as image:
        width, height = image.size
        # as long as nothing is loaded, which getexif does to a PNG
        wide_colour, stated = _is_wide_colour(image), _states_white(image)
        if isinstance(image, TiffImagePlugin.TiffImageFile) and source.reading > 2:
            # newer versions of Pillow have turned the size already when a TIFF is opened, older ones when it is decoded
            width, height = image.tag_v2[ExifTags.Base.ImageWidth], image.tag_v2[ExifTags.Base.ImageLength]
        if (source.size is None or image.format != "PNG") and image.getexif().get(
            ExifTags.Base.Orientation
        ) in _ROTATED:
            width, height = height, width
        transparent = bool(image.has_transparency_data)
        wide = _wide_mode(image)
        mode = wide or ("RGBA" if transparent else image.mode)
        frames = image.format != "MPO" and getattr(image, "is_animated", False)  # MPO: a photo with its depth map
        unstated = wide is not None and not stated
        return Header(height, width, mode, transparent, wide_colour, frames, unstated)


def read_range(file: Item, source: Source) -> tuple[float, float, bool]:
    """The smallest and the largest number in an image; for colours of 16 bits, of the upper 8 that Pillow keeps.

    And whether all are multiples of 257, as 8 bits are that were stretched to 0…65535.

    Raises:
        Unreadable: it cannot be decoded, or holds NaN or infinities.
    """
    with _opened(file, source) as image:
        values = np.asarray(image)
        if image.mode in ("LA", "RGBA"):
            values = values[..., :-1]
        least, most = float(values.min()), float(values.max())
        if not (math.isfinite(least) and math.isfinite(most)):
            raise Unreadable("holds NaN or infinities")
        return least, most, bool(values.dtype.kind != "f" and not np.any(values.astype(np.int64) % 257))


def check_image(file: Item, source: Source) -> None:
    """Decode an image as cheaply as possible, to see whether it is whole.

    Raises:
        Unreadable: it is not.
    """
    with _opened(file, source) as image:
        image.draft(None, (1, 1))
        image.load()


def read_image(
    file: Item, size: tuple[int, int], channels: int, source: Source, *, bicubic: bool = False
) -> NDArray[np.uint8]:
    """An image brought to (H, W) ``size`` and to ``channels``, uint8 [H, W, C].

    By :func:`ddpmx.images.resize.resized`. ``source.white`` must be known if it is a grey of more than 8 bits.

    Raises:
        Unreadable: it cannot be decoded.
    """
    height, width = size
    with _opened(file, source) as opened:
        if source.reading > 1:
            _draft(opened, size)
        wide, stated = _wide_mode(opened), _states_white(opened)
        transparent = bool(opened.has_transparency_data)
        picture: Image.Image = ImageOps.exif_transpose(opened)
        if wide:
            white = None if stated else source.white
            picture = _to_8_bits(picture, 65535 if white is None else white)
        if transparent and channels != 4 and source.reading > 1:
            picture = _on_background(picture, source.background)
        picture = resized(picture.convert(MODES[channels]), size, bicubic=bicubic)
        return np.asarray(picture, np.uint8).reshape(height, width, channels)


@contextlib.contextmanager
def own_limit() -> Iterator[None]:
    """Leave the limit of an image's size to :func:`_opened`: Pillow's holds for the process and warns in between."""
    global _limit_users, _limit
    with _limit_lock:
        if not _limit_users:
            _limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _limit_users += 1
    try:
        yield
    finally:
        with _limit_lock:
            _limit_users -= 1
            if not _limit_users:
                Image.MAX_IMAGE_PIXELS = _limit


@functools.cache
def plugins() -> frozenset[str]:
    """Those of :data:`PLUGINS` that are here."""
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return frozenset(name for name in PLUGINS if name in Image.OPEN and (name != "AVIF" or features.check("avif")))


@contextlib.contextmanager
def _opened(file: Item, source: Source) -> Iterator[Image.Image]:
    """An image of a common format; for some others Pillow starts external programs.

    Raises:
        Unreadable: whatever happens in the block, since decoders can raise anything on damaged files.
    """
    try:
        if isinstance(file, Path) and not file.is_file():  # reading a pipe could block
            raise Unreadable("not a regular file")
        formats = FORMATS if source.reading < 3 else (*FORMATS, *sorted(plugins()))
        with (
            contextlib.nullcontext(file) if isinstance(file, Path) else file.open() as place,
            Image.open(place, formats=formats) as image,
        ):
            pixels = image.width * image.height
            if pixels > source.max_pixels:
                megapixels = math.ceil(pixels / 1e6)
                raise Unreadable(
                    f"{megapixels} megapixels, more than {source.max_pixels / 1e6:.0f}", megapixels=megapixels
                )
            with _one_at_a_time if pixels > _LARGE else contextlib.nullcontext():
                yield image
    except Unreadable:
        raise
    except UnidentifiedImageError as error:
        raise Unreadable("not an image") from error
    except DdpmxError as error:
        raise Unreadable(error.fact) from error
    except Exception as error:
        raise Unreadable(str(error)[:200] or type(error).__name__) from error


def _wide_mode(image: Image.Image) -> str | None:
    """The mode of a grey of more than 8 bits, or None. Pillow has 32 bits for PGMs, and older versions for PNGs, of 16."""
    if image.mode in _GREY_16 or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return "I;16"
    return image.mode if image.mode in ("I", "F") else None


def _states_white(image: Image.Image) -> bool:
    """Whether the file says which number is white, asked before it is decoded.

    A portable greymap has a field for it, and Pillow scales its numbers to 65535. Where the field itself says 65535, it may
    mean no more than that there are two bytes, as in a PNG: then Pillow reads the numbers as they are.
    """
    return image.mode == "I" and image.format == "PPM" and getattr(image, "tile", [("raw",)])[0][0] != "raw"


def _is_wide_colour(image: Image.Image) -> bool:
    """Whether Pillow drops the lower 8 of 16 bits of a colour."""
    if image.format not in ("PNG", "TIFF") or not image.mode.startswith(("RGB", "LA")):
        return False
    tile = getattr(image, "tile", None)
    arguments = tile[0][3] if tile else ""
    return ";16" in str(arguments if isinstance(arguments, str) else arguments[0])


def _draft(image: Image.Image, size: tuple[int, int]) -> None:
    """Have a JPEG decoded at 1/2, 1/4 or 1/8, where it stays at least twice as large as it is needed.

    libjpeg leaves out the high frequencies, and the resizing that follows removes what is left above the target's.
    """
    if image.format not in ("JPEG", "MPO"):
        return
    height, width = size
    if image.getexif().get(ExifTags.Base.Orientation) in _ROTATED:
        height, width = width, height
    scale = max(height / image.height, width / image.width)
    image.draft(None, (max(1, math.ceil(2 * scale * image.width)), max(1, math.ceil(2 * scale * image.height))))


def _to_8_bits(image: Image.Image, white: float) -> Image.Image:
    """⌊255·v/white⌋ for whole numbers, and 255·v/white rounded for floats, which 8-bit images divided by 255 survive."""
    values = np.asarray(image)
    if values.dtype.kind == "f":
        levels = np.floor(values.astype(np.float64) * (255 / white) + 0.5)
    else:
        levels = np.floor(values.astype(np.int64) * 255 / white)
    grey = Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
    if isinstance(hole := image.info.get("transparency"), int):  # one number that means "transparent"
        alpha = Image.fromarray(np.where(values == hole, 0, 255).astype(np.uint8))
        return Image.merge("LA", (grey, alpha))
    return grey


def _on_background(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The image laid on one colour (the "over" of Porter & Duff 1984), RGB."""
    top = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", top.size, (*background, 255)), top).convert("RGB")
