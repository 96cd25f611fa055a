"""Images between the model's [−1, 1] and files: uint8, PNG, grids, animations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ddpmx.errors import InputError
from ddpmx.files import atomic_write

if TYPE_CHECKING:
    from PIL.Image import Image

UInt8 = NDArray[np.uint8]


def to_uint8(x: NDArray[np.float32]) -> UInt8:
    """[−1, 1] to 0…255: floor(127.5·x + 128), clipped, computed in float32.

    Each of the 256 levels comes back as itself. Truncating (x + 1)·127.5, as is often done, puts 63 of them one too
    low. NaN gives 0.
    """
    scaled = np.asarray(x, np.float32) * np.float32(127.5) + np.float32(128)
    levels: UInt8 = np.nan_to_num(np.clip(scaled, np.float32(0), np.float32(255)), nan=0.0).astype(np.uint8)
    return levels


def from_uint8(images: UInt8) -> NDArray[np.float32]:
    """0…255 to [−1, 1]: u/127.5 − 1, float32."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_nhwc(x: NDArray[np.float32]) -> UInt8:
    """float32 [n, C, H, W] in [−1, 1] to uint8 [n, H, W, C]."""
    return to_uint8(np.ascontiguousarray(x.transpose(0, 2, 3, 1)))


def grid(images: UInt8, *, columns: int | None = None, gap: int = 1) -> UInt8:
    """Lay images side by side, row after row, on a white ground.

    Args:
        images: uint8 [n, H, W, C], n ≥ 1.
        columns: how many in a row; about √n by default.
        gap: white pixels between and around them.

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


def save_png(path: str | os.PathLike[str], image: UInt8, *, zoom: int = 1) -> None:
    """Write one uint8 [H, W, C] image, C = 1 (grey), 3 (RGB) or 4 (RGBA), each pixel ``zoom`` pixels wide.

    Raises:
        InputError: C is none of those.
        OutputError: it could not be written.
    """
    picture = _pil(image, zoom)
    with atomic_write(path) as stream:
        picture.save(stream, format="PNG")


def save_gif(path: str | os.PathLike[str], frames: Sequence[UInt8], *, zoom: int = 1, milliseconds: int = 60) -> None:
    """Write uint8 [H, W, C] frames as an animation that repeats, resting for a second on the last one.

    Raises:
        InputError: there is no frame, or C is not 1, 3 or 4.
        OutputError: it could not be written.
    """
    if not frames:
        raise InputError("an animation needs at least one frame")
    first, *rest = [_pil(frame, zoom) for frame in frames]
    with atomic_write(path) as stream:
        first.save(
            stream,
            format="GIF",
            save_all=True,
            append_images=rest,
            duration=[milliseconds] * len(rest) + [1000],
            loop=0,
        )


def zoom_for(side: int, *, at_least: int = 512) -> int:
    """A whole factor that makes a picture of ``side`` pixels about ``at_least`` pixels wide on a screen."""
    return max(1, round(at_least / side))


def _pil(image: UInt8, zoom: int) -> Image:
    from PIL import Image as PilImage

    channels = image.shape[-1]
    if channels not in (1, 3, 4):
        raise InputError(
            f"images of {channels} channels cannot be shown as a picture",
            note="grey, RGB and RGBA can",
            hint="Pipeline.generate returns the array",
        )
    if zoom > 1:
        image = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
    return PilImage.fromarray(image[:, :, 0] if channels == 1 else image)


def image_path(folder: Path, index: int) -> Path:
    """Where image ``index`` belongs: five digits, more when it needs them."""
    return folder / f"{index:05d}.png"
