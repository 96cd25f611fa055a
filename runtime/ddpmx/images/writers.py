"""Pixels as PNGs and animations, and images laid out as a grid."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddpmx.errors import InputError
from ddpmx.formats.atomic import atomic_write
from ddpmx.sampling.pixels import UInt8

if TYPE_CHECKING:
    from PIL.Image import Image


def grid(images: UInt8, *, columns: int | None = None, gap: int = 1) -> UInt8:
    """Lay images out in rows on a white background.

    Args:
        images: uint8 [n, H, W, C], n ≥ 1.
        columns: images per row; about √n by default.
        gap: white pixels between and around the images.

    Returns:
        uint8 [H', W', C].
    """
    n, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for index, image in enumerate(images):
        top = gap + (index // columns) * (height + gap)
        left = gap + (index % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def sheet(images: Sequence[UInt8], *, columns: int) -> UInt8:
    """Images of one size, uint8 [H, W, C] each, as one picture, enlarged so that it can be looked at."""
    small = grid(np.stack(images), columns=columns)
    zoom = zoom_for(small.shape[1])
    return small.repeat(zoom, axis=0).repeat(zoom, axis=1)


def save_png(
    path: str | os.PathLike[str], image: UInt8, *, zoom: int = 1, text: Mapping[str, str] | None = None
) -> None:
    """Write one uint8 [H, W, C] image, C = 1 (grey), 3 (RGB) or 4 (RGBA), enlarged ``zoom`` times.

    ``text`` goes into the file, by keyword (1…79 characters of Latin-1).

    Raises:
        InputError: C is not 1, 3 or 4.
        OutputError: the file could not be written.
    """
    data = png(image, zoom=zoom, text=text)
    with atomic_write(path) as stream:
        stream.write(data)


def save_gif(
    path: str | os.PathLike[str],
    frames: Sequence[UInt8],
    *,
    zoom: int = 1,
    milliseconds: int = 60,
    comment: bytes = b"",
) -> None:
    """Write uint8 [H, W, C] frames as a GIF that repeats, with the last frame shown for a second.

    Raises:
        InputError: there is no frame, or C is not 1, 3 or 4.
        OutputError: the file could not be written.
    """
    data = gif(frames, zoom=zoom, milliseconds=milliseconds, comment=comment)
    with atomic_write(path) as stream:
        stream.write(data)


def png(image: UInt8, *, zoom: int = 1, text: Mapping[str, str] | None = None) -> bytes:
    """The PNG that :func:`save_png` writes. Pillow writes to memory: what it says of a full disk nobody understands."""
    from PIL.PngImagePlugin import PngInfo

    picture, chunks, stream = _pil(image, zoom), PngInfo(), io.BytesIO()
    for keyword, value in (text or {}).items():
        chunks.add_text(keyword, value)
    picture.save(stream, format="PNG", pnginfo=chunks)
    return stream.getvalue()


def picture(image: UInt8, kind: str, *, text: Mapping[str, str] | None = None) -> bytes:
    """One image as ``png`` with its text, or as ``webp`` without a loss and without text."""
    if kind == "png":
        return png(image, text=text)
    stream = io.BytesIO()
    _pil(image, 1).save(stream, format="WEBP", lossless=True, exact=True)
    return stream.getvalue()


def gif(frames: Sequence[UInt8], *, zoom: int = 1, milliseconds: int = 60, comment: bytes = b"") -> bytes:
    """The GIF that :func:`save_gif` writes."""
    if not frames:
        raise InputError("an animation needs at least one frame")
    stream = io.BytesIO()
    first, *rest = [_pil(frame, zoom) for frame in frames]
    first.save(
        stream,
        format="GIF",
        save_all=True,
        append_images=rest,
        duration=[milliseconds] * len(rest) + [1000],
        loop=0,
        comment=comment,
    )
    return stream.getvalue()


def zoom_for(side: int, *, at_least: int = 512) -> int:
    """The whole factor that enlarges ``side`` pixels to about ``at_least``; at least 1."""
    return max(1, round(at_least / side))


def _pil(image: UInt8, zoom: int) -> Image:
    from PIL import Image as PilImage

    channels = image.shape[-1]
    if channels not in (1, 3, 4):
        raise InputError(
            f"images of {channels} channels cannot be saved as a picture",
            note="grey, RGB and RGBA images can",
            hint="Pipeline.generate returns the array",
        )
    if zoom > 1:
        image = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
    return PilImage.fromarray(image[:, :, 0] if channels == 1 else image)


def image_path(folder: Path, index: int) -> Path:
    """The path of image ``index``: five digits, or more if needed."""
    return folder / f"{index:05d}.png"
