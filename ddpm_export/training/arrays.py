"""Images as an array in an .npz → uint8 [N, H, W, C]."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.errors import DataError, FileFormatError
from ddpmx.formats.npz import read_npz

MAX_BYTES = 8 << 30
"""Arrays that are not read in parts may unpack to this much."""

_CHANNELS = (1, 3, 4)


def check_npz(path: Path, *, for_conditions: bool = False) -> None:
    """Check that ``path`` has the name of an ``.npz`` and is a file.

    Raises:
        DataError: it is not.
    """
    if not os.path.exists(path):
        raise DataError(f"{path}: there is no such file or folder", hint="--data takes a folder of images or an .npz")
    if for_conditions and path.suffix.lower() != ".npz":
        raise DataError(
            f"{path}: conditions for the images of an .npz are an .npz as well", hint="numpy.savez(path, cond=…)"
        )
    if path.suffix.lower() != ".npz" or not path.is_file():
        raise DataError(f"{path}: neither a folder nor an .npz", hint="--data takes a folder of images or an .npz")


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Every array of an .npz by its name.

    Raises:
        DataError: it is damaged, or unpacks to too much.
    """
    try:
        return read_npz(path, max_bytes=MAX_BYTES, kinds="biufcSUMmV")  # labels may be text
    except FileFormatError as error:
        raise DataError(error.fact, note=error.note, hint="made with numpy.savez(path, images=…)?") from error


def images_of(
    path: Path, arrays: Mapping[str, NDArray[Any]], white: float | None, *, besides: Collection[str] = ()
) -> tuple[NDArray[np.uint8], str, str | None]:
    """The one array of images in an .npz, its name, and a line about its numbers unless it is uint8 as it is.

    Args:
        path: the file, for errors.
        arrays: all that it holds.
        white: the number that is white.
        besides: arrays that are something else.

    Raises:
        DataError: there is none, or more than one, or its numbers cannot be read.
    """
    images = [name for name, array in arrays.items() if array.ndim in (3, 4) and name not in besides]
    if len(images) != 1:
        listing = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items()) or "nothing"
        raise DataError(
            f"{path}: {'more than one array' if images else 'no array'} of images in it",
            note=f"it holds {listing}"[:300],
            hint="one array [N, H, W], [N, H, W, C] or [N, C, H, W], any name",
        )
    array, name, note = arrays[images[0]], images[0], None
    if array.dtype != np.uint8 or white is not None:  # 0 and 1, say, may be uint8 as well
        numbers, array = array, to_8_bits(array, white, f"{path}: {name!r}")
        beyond = "; what is larger is white too" if numbers.max() > (white or 0) else ""
        note = (
            f"{name!r} is {numbers.dtype}: numbers from {numbers.min():g} to {numbers.max():g}, "
            f"white is {white or 0:g}{beyond} (--white sets it)"
        )
    if array.ndim == 3 and array.shape[-1] in (3, 4):
        raise DataError(
            f"{path}: {name!r} is [{', '.join(map(str, array.shape))}]: one image, or many of that width?",
            hint="images[None] for one image, images[..., None] for many",
        )
    if array.ndim == 3:
        array = array[..., None]
    elif array.shape[-1] not in _CHANNELS and array.shape[1] in _CHANNELS:
        array = array.transpose(0, 2, 3, 1)
    if array.shape[-1] not in _CHANNELS or 0 in array.shape:
        raise DataError(f"{path}: {name!r} has the shape {list(array.shape)}", hint="N images of 1, 3 or 4 channels")
    return np.ascontiguousarray(array), name, note


def to_8_bits(array: NDArray[Any], white: float | None, what: str) -> NDArray[np.uint8]:
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
