"""Images as an array in an .npz or an .npy → uint8 [N, H, W, C], in memory or left in the file."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_export.training.images.on_disk import OnDisk, Slot, identity_of, slot_of_npy, slots_of_npz
from ddpm_export.training.images.pixels import InMemory, Pixels
from ddpmx.errors import DataError, FileFormatError
from ddpmx.formats.npz import read_npz

MAX_BYTES = 8 << 30
"""Arrays of which single images cannot be read, since they are compressed or no bytes, may unpack to this much."""

SUFFIXES = (".npz", ".npy")
_CHANNELS = (1, 3, 4)
_KINDS = "biufcSUMmV"
"""Labels may be text."""


def check_place(path: Path, *, for_conditions: bool = False) -> None:
    """Check that ``path`` has the name of an ``.npz`` or ``.npy`` and is a file.

    Raises:
        DataError: it is not.
    """
    hint = "--data takes a folder of images, an .npz, an .npy, or .tar shards"
    if not os.path.exists(path):
        raise DataError(f"{path}: there is no such file or folder", hint=hint)
    if for_conditions and path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path}: conditions for the images of an array are an array as well", hint="numpy.savez(path, cond=…)"
        )
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        raise DataError(f"{path}: neither a folder nor an .npz, .npy or .tar", hint=hint)


@dataclass(frozen=True)
class Arrays:
    """What a file holds.

    Attributes:
        path: the file.
        values: its arrays by name, those of many bytes as slots, of which single images are read.
        slots: where they lie in the file.
    """

    path: Path
    values: Mapping[str, NDArray[Any] | Slot]
    slots: Mapping[str, Slot]

    def only(self, name: str) -> Arrays:
        """One of them."""
        return Arrays(self.path, {name: self.values[name]}, self.slots)


def read_arrays(path: Path, limit: int, white: float | None) -> Arrays:
    """The arrays of an .npz, or the one of an .npy, whose name is then that of the file.

    Args:
        path: the file.
        limit: an array of more bytes is left in the file, if images can be read out of it.
        white: with a number that is white, all numbers are converted, and so are in memory.

    Raises:
        DataError: it is damaged, or unpacks to too much.
    """
    try:
        if not path.is_file():  # reading a pipe would block
            raise FileFormatError(f"{path}: cannot be read", note="not a file")
        if path.suffix.lower() == ".npy":
            slot = slot_of_npy(path)
            return Arrays(path, {path.name: slot if _stays(slot, limit, white) else _whole(slot)}, {path.name: slot})
        slots = slots_of_npz(path)
        there = {name: slot for name, slot in slots.items() if _stays(slot, limit, white)}
        values = read_npz(path, max_bytes=MAX_BYTES, kinds=_KINDS, besides=there)
        return Arrays(path, {name: there[name] if name in there else values[name] for name in slots}, slots)
    except FileFormatError as error:
        large = "unpacks to" in error.fact
        hint = "images as uint8 by numpy.savez, not savez_compressed, are read out of the file one by one"
        raise DataError(
            error.fact, note=error.note, hint=hint if large else "made with numpy.savez(path, images=…)?"
        ) from error


def _stays(slot: Slot, limit: int, white: float | None) -> bool:
    return slot.in_parts and slot.ndim in (3, 4) and slot.nbytes > limit and white is None


def _whole(slot: Slot) -> NDArray[Any]:
    """An .npy in memory.

    Raises:
        FileFormatError: it is too large, or no array of plain numbers.
    """
    if slot.nbytes > MAX_BYTES:
        raise FileFormatError(
            f"{slot.path}: unpacks to {slot.nbytes / 2**20:.0f} MiB",
            note=f"of {slot.dtype}{' in the order of Fortran' if slot.fortran else ''}",
        )
    if slot.dtype.kind not in _KINDS:
        raise FileFormatError(f"{slot.path}: not a valid .npy file", note=f"it holds {slot.dtype}, not plain numbers")
    try:
        flat = np.fromfile(slot.path, slot.dtype, offset=slot.offset or 0)
        return flat.reshape(slot.shape[::-1]).T if slot.fortran else flat.reshape(slot.shape)
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{slot.path}: not a valid .npy file", note=str(error)[:200]) from error


def images_of(
    arrays: Arrays, white: float | None, *, besides: Collection[str] = (), identity: str = "pixels", first: bool = False
) -> tuple[Pixels, str, str | None]:
    """The one array of images, its name, and a line about its numbers unless it is uint8 as it is.

    Args:
        arrays: all that the file holds.
        white: the number that is white.
        besides: arrays that are something else.
        identity: what the images are known by, see :class:`.Source`.
        first: whether a run begins: then images that are left in the file are known by the ``files`` identity.

    Raises:
        DataError: there is none, or more than one, or its numbers cannot be read.
    """
    path = arrays.path
    images = [name for name, array in arrays.values.items() if array.ndim in (3, 4) and name not in besides]
    if len(images) != 1:
        listing = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.values.items()) or "nothing"
        raise DataError(
            f"{path}: {'more than one array' if images else 'no array'} of images in it",
            note=f"it holds {listing}"[:300],
            hint="one array [N, H, W], [N, H, W, C] or [N, C, H, W], any name",
        )
    array, name, note = arrays.values[images[0]], images[0], None
    if isinstance(array, np.ndarray) and (array.dtype != np.uint8 or white is not None):
        numbers, array = array, to_8_bits(array, white, f"{path}: {name!r}")  # 0 and 1, say, may be uint8 as well
        beyond = "; what is larger is white too" if numbers.max() > (white or 0) else ""
        note = (
            f"{name!r} is {numbers.dtype}: numbers from {numbers.min():g} to {numbers.max():g}, "
            f"white is {white or 0:g}{beyond} (--white sets it)"
        )
    channels_first = _channels_first(f"{path}: {name!r}", array.shape)
    pixels: Pixels
    if isinstance(array, np.ndarray):
        shaped = array[..., None] if array.ndim == 3 else array.transpose(0, 2, 3, 1) if channels_first else array
        pixels = InMemory(np.ascontiguousarray(shaped))
    else:
        pixels = OnDisk(array, channels_first=channels_first)
        identity = "files" if first else identity
        note = f"{name!r} is read out of the file, image by image: it takes {array.nbytes / 2**30:.1f} GiB"
    if identity == "files":
        pixels.identity = identity_of(arrays.slots[name])
    return pixels, name, note


def _channels_first(what: str, shape: tuple[int, ...]) -> bool:
    """Whether images of this shape are [N, C, H, W].

    Raises:
        DataError: they are no images.
    """
    if len(shape) == 3 and shape[-1] in (3, 4):
        raise DataError(
            f"{what} is [{', '.join(map(str, shape))}]: one image, or many of that width?",
            hint="images[None] for one image, images[..., None] for many",
        )
    channels_first = len(shape) == 4 and shape[-1] not in _CHANNELS and shape[1] in _CHANNELS
    if 0 in shape or not (len(shape) == 3 or channels_first or shape[-1] in _CHANNELS):
        raise DataError(f"{what} has the shape {list(shape)}", hint="N images of 1, 3 or 4 channels")
    return channels_first


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
