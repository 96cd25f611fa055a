"""Condition images: one for each image, of the same part of the scene, brought to the images' size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpm_export.training import arrays as arrays_of
from ddpm_export.training.arrays import Arrays
from ddpm_export.training.images.decode import MODES
from ddpm_export.training.images.find import Found, find_images
from ddpm_export.training.images.folder import Read, Where, read_images
from ddpm_export.training.images.items import Item, name_of, stem_of
from ddpm_export.training.images.pixels import Pixels
from ddpm_export.training.images.shards import find_in_shards, is_shards
from ddpm_export.training.images.source import Source
from ddpm_export.training.images.tables import Tables, is_tables
from ddpmx.errors import DataError, InputError
from ddpmx.images.resize import resized

NAME = "cond"
"""The name of the condition images in an .npz that holds the images as well."""


@dataclass(frozen=True)
class Pairs:
    """Condition images in the order of their images.

    Attributes:
        pixels: uint8 [N, H, W, K], K 1 or 3.
        white: the number that was read as white, see :class:`.Source`.
        notes: how many were enlarged, and how numbers were read.
    """

    pixels: Pixels
    white: float | None
    notes: tuple[str, ...]


def from_images(
    source: Source, read: Read, progress: Callable[[int, int], None] | None = None, where: Where | None = None
) -> Pairs:
    """The condition images in the folder or shards ``source.condition``, each named as its image apart from the suffix.

    Args:
        source: of images and conditions.
        read: the images.
        progress: called with (conditions read, conditions in all).
        where: where their pixels are to be.

    Raises:
        DataError: an image or a condition has no partner, a pair differs in shape, or a condition cannot be read.
        InputError: one of the two folders lies in the other.
    """
    assert source.condition is not None
    folder = source.condition
    inside = is_shards(folder) or is_tables(folder)
    if not inside and not folder.is_dir():
        raise DataError(
            f"{folder}: no folder of condition images", hint="conditions for image files are image files as well"
        )
    ours, theirs = source.path.resolve(), folder.resolve()
    if not inside and (ours in (theirs, *theirs.parents) or theirs in ours.parents):
        raise InputError(
            f"{folder}: the folder of condition images and that of the images lie in one another",
            note="each would count the other's files as its own",
            hint="two folders side by side: data/images, data/conditions",
        )
    if is_shards(folder):
        found = find_in_shards(folder).found
    else:
        found = Tables(folder).found if inside else find_images(folder, source.reading)
    partner = _pair(source.path, read, folder, found)
    paired = Found([partner[item] for item in read.items], found.containers, found.in_order, found.unreadable)
    white = source.white if source.condition_white is None else source.condition_white
    how = replace(
        source.images_alone(),
        path=folder,
        size=read.size,
        channels=None,
        white=white,
        reading=max(2, source.reading),
        skip_broken=False,
        identity=read.source.identity,  # as the images: what is recorded is one for both
    )
    where = replace(Where() if where is None else where.of_conditions(), first=False)
    conditions = read_images(how, paired, progress, where, conditions=True)
    _check_shapes(folder, read, conditions)
    smaller = [header for header in conditions.headers.values() if _enlarged(header.height, header.width, read.size)]
    notes = [f"condition images: {note}" for note in conditions.notes]
    if smaller:
        sizes = {(header.height, header.width) for header in smaller}
        notes.append(_enlargement(len(smaller), len(read.items), sizes, read.size))
    return Pairs(conditions.pixels, conditions.source.white, tuple(notes))


def from_arrays(source: Source, arrays: Arrays | None, images: Pixels, limit: int) -> Pairs:
    """The condition images in the .npz or .npy ``source.condition``.

    Args:
        source: of images and conditions.
        arrays: what ``source.path`` holds, if the conditions are there as well, as ``cond``.
        images: the images.
        limit: conditions of more bytes are left in the file.

    Raises:
        DataError: there is no array of N condition images of 1 or 3 channels and the images' shape.
    """
    assert source.condition is not None
    path, (count, *sides, _) = source.condition, images.shape
    size = (sides[0], sides[1])
    white = source.white if source.condition_white is None else source.condition_white
    if arrays is None:
        arrays_of.check_place(path, for_conditions=True)
        arrays = arrays_of.read_arrays(path, limit, None)
        if NAME in arrays.values:
            arrays = arrays.only(NAME)
    elif NAME not in arrays.values:
        raise DataError(
            f"{path}: no array {NAME!r} of condition images",
            note=f"it holds {', '.join(arrays.values)}"[:300],
            hint=f"numpy.savez(path, images=…, {NAME}=…)",
        )
    else:
        arrays = arrays.only(NAME)
    shown = [array for array in arrays.values.values() if array.ndim in (3, 4)]
    if len(shown) == 1 and shown[0].dtype == np.uint8:
        white = None
    conditions, name, note = arrays_of.images_of(arrays, white, identity=source.identity)
    n, height, width, channels = conditions.shape
    if n != count or channels == 4:
        raise DataError(
            f"{path}: {name!r} holds {n} condition images of {channels} channels",
            note=f"there are {count} images",
            hint="one of 1 or 3 channels for each image, in the same order",
        )
    if not _is_alike((height, width), size):
        raise DataError(
            f"{path}: condition images of {height}×{width} for images of {size[0]}×{size[1]}",
            note="they would not lie on one another",
            hint="condition images of the same shape, in any size",
        )
    notes = [] if note is None else [f"condition images: {note}"]
    if (height, width) != size:
        if _enlarged(height, width, size):
            notes.append(_enlargement(count, count, {(height, width)}, size))
        conditions = Resized(conditions, size)
    return Pairs(conditions, white, tuple(notes))


class Resized(Pixels):
    """Condition images that are brought to another size when they are taken.

    Args:
        pixels: the images.
        size: (H, W).
    """

    def __init__(self, pixels: Pixels, size: tuple[int, int]) -> None:
        self._pixels, self._size = pixels, size
        self.identity = pixels.identity

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, K)."""
        n, _, _, channels = self._pixels.shape
        return n, *self._size, channels

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The images of these numbers, the smaller ones enlarged by a bicubic filter."""
        images = self._pixels.take(indices)
        channels = images.shape[3]
        out = np.empty((len(images), *self._size, channels), np.uint8)
        for image, to in zip(images, out, strict=True):
            picture = Image.fromarray(image[..., 0] if channels == 1 else image, MODES[channels])
            to[...] = np.asarray(resized(picture, self._size, bicubic=True)).reshape(*self._size, channels)
        return out


def _pair(folder: Path, read: Read, condition_folder: Path, found: Found) -> dict[Item, Item]:
    """The condition of every image.

    Raises:
        DataError: not each has exactly one, all of which are named.
    """
    ours, theirs = _by_stem(folder, read.items), _by_stem(condition_folder, found.files)
    items = [f"{stem}: {len(same)} images of that name" for stem, same in ours.items() if len(same) > 1]
    items += [f"{stem}: {len(same)} condition images of that name" for stem, same in theirs.items() if len(same) > 1]
    unreadable = _by_stem(condition_folder, [item for item, _ in found.unreadable])
    missing = [stem for stem in ours if stem not in theirs and stem not in unreadable]
    surplus = [stem for stem in theirs if stem not in ours and stem not in read.skipped]
    items += [f"{stem}: no condition image" for stem in missing]
    items += [f"{stem}: no image" for stem in surplus]
    if items:
        raise DataError(
            f"{condition_folder}: images and condition images are not one to one",
            note=f"{len(missing)} images have no condition image, {len(surplus)} condition images no image",
            hint="the same names in the same subfolders; only suffixes may differ",
            items=items,
        )
    return {same[0]: theirs[stem][0] for stem, same in ours.items() if stem in theirs}


def _by_stem(folder: Path, items: Iterable[Item]) -> dict[str, list[Item]]:
    stems: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        stems[stem_of(item, folder)].append(item)
    return stems


def _check_shapes(folder: Path, read: Read, conditions: Read) -> None:
    """Check that pairs have one shape: otherwise cropping would take other parts of the two.

    Raises:
        DataError: some do not, all of which are named.
    """
    items = []
    for file, partner in zip(read.items, conditions.items, strict=True):
        image, condition = read.headers.get(file), conditions.headers.get(partner)
        if image is None or condition is None:  # of the cache: they were alike when it was written
            continue
        ours, theirs = (image.height, image.width), (condition.height, condition.width)
        if not (_is_alike(theirs, ours) or _is_alike(theirs[::-1], ours)):  # a camera's may be turned only when decoded
            items.append(f"{name_of(partner, folder)}: {theirs[0]}×{theirs[1]} for an image of {ours[0]}×{ours[1]}")
    if items:
        raise DataError(
            f"{folder}: {len(items)} condition images have another shape than their images",
            note="cropped to one shape, they would not lie on one another",
            hint="condition images of the same shape, in any size",
            items=items,
        )


def _is_alike(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes have one shape, but for a rounding of the smaller one."""
    return abs(one[0] * other[1] - one[1] * other[0]) <= max(*one, *other) / 2 + 0.5


def _enlarged(height: int, width: int, size: tuple[int, int]) -> bool:
    return max(size[0] / height, size[1] / width) > 1


def _enlargement(count: int, total: int, sizes: set[tuple[int, int]], size: tuple[int, int]) -> str:
    of = ", ".join(f"{h}×{w}" for h, w in sorted(sizes)[:3]) + (", …" if len(sizes) > 3 else "")
    return f"condition images: {count} of {total} are smaller ({of}) and enlarged to {size[0]}×{size[1]}, bicubic"
