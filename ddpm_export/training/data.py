"""Image folders, arrays and shards → uint8 [N, H, W, C], checked before training begins."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpm_export.training import arrays as arrays_of
from ddpm_export.training import conditions as conditions_of
from ddpm_export.training import labels as labels_of
from ddpm_export.training.images import cache
from ddpm_export.training.images.folder import Read, Where, read_folder, read_images
from ddpm_export.training.images.items import name_of
from ddpm_export.training.images.pixels import InMemory, Pixels
from ddpm_export.training.images.shards import find_in_shards, is_shards, label_texts
from ddpm_export.training.images.source import WHITE, Source
from ddpm_export.training.images.tables import Tables, checked, is_tables
from ddpmx.errors import InputError

__all__ = ["WHITE", "Conditions", "Dataset", "Source", "are_files", "load_dataset"]


class Dataset:
    """Images, and what belongs to each of them.

    Args:
        images: uint8 [N, H, W, C], or where else they can be taken from.
        source: where they came from.
        notes: what a user should know before training: files left out, how transparency and numbers were read.
        cache_key: of a folder's images, see :mod:`.images.cache`.
        labels: int32 [N], the class of each image, 0…K−1.
        classes: the K names.
        conditions: an image for each image, uint8 [N, H, W, K], or where else they can be taken from.
    """

    def __init__(
        self,
        images: NDArray[np.uint8] | Pixels,
        source: Source,
        notes: tuple[str, ...] = (),
        cache_key: str | None = None,
        *,
        labels: NDArray[np.int32] | None = None,
        classes: tuple[str, ...] | None = None,
        conditions: NDArray[np.uint8] | Pixels | None = None,
    ) -> None:
        self.pixels: Pixels = InMemory(images) if isinstance(images, np.ndarray) else images
        self.source, self.notes, self.cache_key = source, notes, cache_key
        self.labels, self.classes = labels, classes
        self._fingerprint: str | None = None
        if isinstance(conditions, np.ndarray):
            conditions = InMemory(conditions)
        self.conditions = None if conditions is None else Conditions(conditions)

    def __len__(self) -> int:
        """The number of images."""
        return self.pixels.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, height, width, channels = self.pixels.shape
        return channels, height, width

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The images of these numbers, in this order: uint8 [B, H, W, C].

        Raises:
            DataError: a file cannot be read any more.
        """
        return self.pixels.take(indices)

    @property
    def images(self) -> NDArray[np.uint8]:
        """All images, uint8 [N, H, W, C]. They are read into memory unless they are there."""
        if isinstance(self.pixels, InMemory):
            return self.pixels.array
        return self.pixels.take(np.arange(len(self), dtype=np.int64))

    def fingerprint(self) -> str:
        """A hash of shape, pixels, labels and conditions, to check that a resumed run has what it began with."""
        if self._fingerprint is not None:
            return self._fingerprint
        digest = hashlib.sha256(repr(self.pixels.shape).encode())
        self.pixels.hash_into(digest.update)
        if self.labels is not None:
            digest.update(b"labels" + repr(self.classes).encode() + self.labels.astype("<i4").tobytes())
        if self.conditions is not None:
            digest.update(b"conditions" + repr(self.conditions.pixels.shape).encode())
            self.conditions.pixels.hash_into(digest.update)
        self._fingerprint = digest.hexdigest()
        return self._fingerprint


@dataclass(frozen=True, eq=False)
class Conditions:
    """The condition images of a data set.

    Attributes:
        pixels: where they are.
    """

    pixels: Pixels

    @property
    def channels(self) -> int:
        """The K of [N, H, W, K]."""
        return self.pixels.shape[3]

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Those of the images of these numbers, in this order: uint8 [B, H, W, K].

        Raises:
            DataError: a file cannot be read any more.
        """
        return self.pixels.take(indices)


def load_dataset(
    path: str | os.PathLike[str],
    *,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    background: tuple[int, int, int] | None = None,
    white: float | None = None,
    max_pixels: int | None = None,
    classes: bool = False,
    condition: str | os.PathLike[str] | None = None,
    skip_broken: bool = False,
    keep: Path | None = None,
    memory_limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Read a folder of images (with its subfolders and the folders linked there) or an ``.npz``.

    Args:
        path: a folder of images; an ``.npz`` or ``.npy`` with one array of images: [N, H, W], [N, H, W, C] or [N, C, H, W],
            uint8, or with ``white`` any whole numbers or floats from 0 on; or WebDataset's shards: a ``.tar``, a folder of
            them, or several as ``shards-{0000..0009}.tar``; or, with pyarrow, Parquet files in the same forms, and what
            ``datasets`` has saved by ``save_to_disk``.
        size: (H, W) to bring every image to: the largest centred part of that shape, resized. Image files only.
        channels: 1, 3 or 4, to convert every image to grey, RGB or RGBA. Image files only.
        background: the colour (R, G, B), 0…255, behind transparent pixels of images without a channel for it. White by
            default. Image files only.
        white: the number that is white, in greys of more than 8 bits and in an ``.npz``. Greys of 16 bits may do without:
            white is then the full scale of 8, 10, 12, 14 or 16 bits, by the largest number in all images.
        max_pixels: the largest H·W of a file, 178,956,970 by default. Image files only.
        classes: whether the images have labels: in a folder, its subfolders, sorted by name; in an ``.npz``, an array of N
            whole numbers, and one of K names if there is one; in shards, ``KEY.cls`` or ``KEY.txt``; in tables
            the column that is marked as such, or the only one of whole numbers, or ``label``.
        condition: the condition images. For a folder, shards or tables, the same with one for each image, of the same
            name, key or row apart from the suffix. For an ``.npz``, another with one array of images, or the same with
            them as ``cond``. They are brought to the size of the images, and have 1 or 3 channels.
        skip_broken: leave out files that cannot be read; the notes name them. Image files only.
        keep: a run's folder. Pixels that do not fit into memory are decoded once and kept there; without it, they are
            decoded whenever they are taken. Image files only.
        memory_limit: images of more bytes than this are not kept in memory; half of what is free by default.
        progress: called with (images read, images in all).

    Raises:
        DataError: nothing is there; files cannot be read as images, all of which are named; or the images have different
            sizes or modes and ``size`` or ``channels`` is None.
        InputError: an argument is out of its range, or has no effect on these images.
    """
    source = Source(
        Path(path),
        size,
        channels,
        WHITE if background is None else background,
        white,
        classes=classes,
        condition=None if condition is None else Path(condition),
        condition_white=None if condition is None else white,
        skip_broken=skip_broken,
    )
    if max_pixels is not None:
        source = replace(source, max_pixels=max_pixels)
    for_files = {"--size": size, "--channels": channels, "--background": background, "--max-megapixels": max_pixels}
    without_effect = [flag for flag, value in for_files.items() if value is not None] + ["--skip-broken"] * skip_broken
    if without_effect and not are_files(source.path):
        source.check()
        arrays_of.check_place(source.path)
        raise InputError(
            f"{' and '.join(without_effect)} {'is' if len(without_effect) == 1 else 'are'} for image files; an array is "
            "taken as it is",
            hint=f"without {'it' if len(without_effect) == 1 else 'them'}, or a folder of images",
        )
    kept = None if keep is None else keep / cache.NAME
    dataset = _load(source, Where(memory_limit, kept, kept, first=True), progress)
    if white is not None and dataset.source.white is None and dataset.source.condition_white is None:
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
    source: Source,
    *,
    progress: Callable[[int, int], None] | None = None,
    cached: Path | None = None,
    keep: Path | None = None,
    memory_limit: int | None = None,
) -> Dataset:
    """Read images as ``source`` says: a run's own, which are read as they were when it began.

    Args:
        source: where they are, and how to read them.
        progress: called with (images read, images in all).
        cached: the cache that a run may have of a folder, see :mod:`.images.cache`.
        keep: as in :func:`load_dataset`.
        memory_limit: as in :func:`load_dataset`.

    Raises:
        DataError, InputError: as :func:`load_dataset`.
    """
    return _load(source, Where(memory_limit, cached, None if keep is None else keep / cache.NAME), progress)


_Progress = Callable[[int, int], None] | None


def _load(source: Source, where: Where, progress: _Progress) -> Dataset:
    source.check()
    if is_shards(source.path):
        return _of_shards(source, where, progress)
    if is_tables(source.path):
        return _of_tables(source, where, progress)
    if os.path.isdir(source.path):
        return _of_folder(source, where, progress)
    return _of_arrays(source, where)


def _of_shards(source: Source, where: Where, progress: _Progress) -> Dataset:
    shards = find_in_shards(source.path)
    read = read_images(source.images_alone(), shards.found, progress, where)
    labels = None
    if source.classes:
        names = [name_of(item, source.path) for item in read.items]
        labels = labels_of.from_texts(source.path, names, label_texts(shards, read.items))
    return _of_items(source, read, labels, where, progress)


def _of_folder(source: Source, where: Where, progress: _Progress) -> Dataset:
    read = read_folder(source.images_alone(), progress, where)
    labels = None
    if source.classes:
        labels = labels_of.from_folders(source.path, [item for item in read.items if isinstance(item, Path)])
    return _of_items(source, read, labels, where, progress)


def _of_tables(source: Source, where: Where, progress: _Progress) -> Dataset:
    tables = Tables(source.path)
    items, numbers = tables.found.files, tables.pixels()
    if numbers is None:
        read = read_images(source.images_alone(), tables.found, progress, where)
        items = list(read.items)
    elif source.size or source.channels or source.condition or source.skip_broken:
        raise InputError(
            f"{source.path}: size, channels, condition and skip_broken are for encoded images",
            note="this table holds lists of numbers, which are taken as they are",
            hint="without them, or a table of encoded images",
        )
    labels = None
    if source.classes:
        texts, names = tables.labels()
        # rows whose image cannot be read are left out, and their labels with them
        texts = [texts[int(item.stem)] for item in items if not isinstance(item, Path)]
        labels = labels_of.from_texts(
            source.path, [name_of(item, source.path) for item in items], texts, checked(texts, names)
        )
    if numbers is None:
        return _of_items(source, read, labels, where, progress)
    arrays = arrays_of.Arrays(source.path, {tables.image: numbers}, {})
    images, _, note = arrays_of.images_of(arrays, source.white)
    return _dataset(images, source, () if note is None else (note,), None, labels, None)


def _of_items(
    source: Source, read: Read, labels: labels_of.Labels | None, where: Where, progress: _Progress
) -> Dataset:
    pairs = None if source.condition is None else conditions_of.from_images(source, read, progress, where)
    source = replace(source, white=read.source.white, identity=read.source.identity)
    return _dataset(read.pixels, source, read.notes, read.key, labels, pairs)


def _of_arrays(source: Source, where: Where) -> Dataset:
    arrays_of.check_place(source.path)
    limit = where.most()
    arrays = arrays_of.read_arrays(source.path, limit, source.white)
    within = source.condition is not None and _is_same(source.condition, source.path)
    images, name, note = arrays_of.images_of(
        arrays,
        source.white,
        besides={conditions_of.NAME} if within else (),
        identity=source.identity,
        first=where.first,
    )
    notes = [] if note is None else [note]
    if images.identity is not None:
        source = replace(source, identity="files")
    if isinstance(images, InMemory) and images.array.nbytes > limit:
        takes = f"{images.array.nbytes / 2**30:.1f} GiB of memory"
        notes.append(f"{name!r} takes {takes}: it is compressed or no uint8, so that it cannot be left in the file")
    labels = labels_of.from_arrays(source.path, arrays.values, name) if source.classes else None
    pairs = None
    if source.condition is not None:
        pairs = conditions_of.from_arrays(source, arrays if within else None, images, limit)
    return _dataset(images, source, tuple(notes), None, labels, pairs)


def _dataset(
    images: Pixels,
    source: Source,
    notes: tuple[str, ...],
    key: str | None,
    labels: labels_of.Labels | None,
    pairs: conditions_of.Pairs | None,
) -> Dataset:
    return Dataset(
        images,
        replace(source, condition_white=None if pairs is None else pairs.white),
        (*notes, *(() if labels is None else labels.notes), *(() if pairs is None else pairs.notes)),
        key,
        labels=None if labels is None else labels.numbers,
        classes=None if labels is None else labels.names,
        conditions=None if pairs is None else pairs.pixels,
    )


def are_files(path: Path) -> bool:
    """Whether a path means image files, which can be brought to a size and to channels: a folder, shards, or tables."""
    return path.is_dir() or is_shards(path) or is_tables(path)


def _is_same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
