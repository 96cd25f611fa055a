"""A folder of images → uint8 [N, H, W, C], or one error that names everything that is wrong with it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpm_export.training.images import cache
from ddpm_export.training.images.decode import (
    Header,
    Unreadable,
    check_image,
    own_limit,
    read_header,
    read_image,
)
from ddpm_export.training.images.decoding import Decoding
from ddpm_export.training.images.find import Found, find_images
from ddpm_export.training.images.items import Item, ends_of, name_of, stem_of
from ddpm_export.training.images.memory import default_limit
from ddpm_export.training.images.on_disk import OnDisk, slots_of_npz
from ddpm_export.training.images.pixels import InMemory, Pixels
from ddpm_export.training.images.source import Source
from ddpm_export.training.images.threads import in_threads
from ddpm_export.training.images.together import (
    Problem,
    Progress,
    attempt,
    channels_of,
    colour_name,
    find_white,
    mode_problems,
    size_problems,
    summary,
)
from ddpmx.errors import DataError
from ddpmx.formats.atomic import make_folder


@dataclass(frozen=True)
class Where:
    """Where pixels are to be.

    Attributes:
        limit: more bytes of pixels than this are not kept in memory; None for half of what is free.
        cached: a cache of the pixels that there may be, see :mod:`.cache`.
        keep: where pixels that are not kept in memory go; without, they are decoded whenever they are taken.
        first: whether a run begins: then the pixels' place decides what they are known by, see ``Source.identity``.
    """

    limit: int | None = None
    cached: Path | None = None
    keep: Path | None = None
    first: bool = False

    def most(self) -> int:
        """The limit in bytes."""
        return default_limit() if self.limit is None else self.limit

    def of_conditions(self) -> Where:
        """The same for the condition images."""
        cached, keep = (file and file.with_name(cache.CONDITIONS) for file in (self.cached, self.keep))
        return dataclasses.replace(self, cached=cached, keep=keep)


@dataclass(frozen=True)
class Read:
    """What came of a folder.

    Attributes:
        pixels: uint8 [N, H, W, C], in the order of the files' names.
        source: with ``white`` as it was found.
        notes: what a user should know before training: what was left out, and how numbers were read.
        key: of the cache, if the pixels may be stored there and are not.
        items: where each image is from.
        headers: of the images that were looked at: all, or none where the cache had the pixels.
        skipped: the images that could not be read, by their names without suffix.
    """

    pixels: Pixels
    source: Source
    notes: tuple[str, ...]
    key: str | None
    items: tuple[Item, ...]
    headers: Mapping[Item, Header] = field(default_factory=dict)
    skipped: frozenset[str] = frozenset()

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.pixels.shape[1], self.pixels.shape[2]


def read_folder(source: Source, progress: Progress | None = None, where: Where = Where()) -> Read:
    """Read every image of ``source.path``.

    Args:
        source: where the images are and how to read them.
        progress: called with (images read, images in all).
        where: where their pixels are to be.

    Raises:
        DataError: there are none, they do not fit together, or some cannot be read.
        OutputError: their pixels could not be written.
    """
    found = find_images(source.path, source.reading)
    if not found.files and not found.unreadable:
        raise DataError(
            f"{source.path}: no images in this folder",
            note=found.describe(),
            hint="it reads PNG, JPEG, BMP, WebP, TIFF, GIF, PPM and AVIF (.png, .jpg, …)",
        )
    return read_images(source, found, progress, where)


def read_images(
    source: Source,
    found: Found,
    progress: Progress | None = None,
    where: Where = Where(),
    *,
    conditions: bool = False,
) -> Read:
    """Read the images that were found.

    Args:
        source: where they are and how to read them.
        found: the images.
        progress: called with (images read, images in all).
        where: where their pixels are to be.
        conditions: whether they are condition images: grey if all of them are, RGB otherwise, and smaller ones, with
            ``source.size``, are enlarged by a bicubic filter.

    Raises:
        DataError: they do not fit together, or some cannot be read.
        OutputError: their pixels could not be written.
    """
    limit = where.most()
    if where.cached is not None and (source.skip_broken or not found.unreadable):
        key = cache.key_of(source, found.files, found.containers)
        kept = cache.load(where.cached, key, limit)
        if kept and (read := _of_cache(kept, key, source, found, where)):
            return read
    with own_limit():
        return _Reading(source, found, progress, where, limit, conditions).read()


_NAMED = 20
"""So many of the files that were left out are named."""


def _of_cache(kept: cache.Kept, key: str, source: Source, found: Found, where: Where) -> Read | None:
    items = tuple(item for item in found.files if name_of(item, source.path) not in kept.skipped)
    if len(items) != kept.pixels.shape[0]:
        return None
    on_disk = isinstance(kept.pixels, OnDisk)
    if where.first and on_disk:
        source = dataclasses.replace(source, identity="files")
    kept.pixels.identity = identity_of(source, items)
    whole = set(items)
    every = [*found.files, *(item for item, _ in found.unreadable)]
    skipped = frozenset(stem_of(item, source.path) for item in every if item not in whole)
    notes = (*kept.notes, _place(kept.pixels, where.cached)) if on_disk else kept.notes
    return Read(kept.pixels, source, notes, None if on_disk else key, items, skipped=skipped)


def _place(pixels: Pixels, file: Path | None) -> str:
    """A line about pixels that are not in memory."""
    takes = f"{math.prod(pixels.shape) / 2**30:.1f} GiB of pixels, more than half of the free memory"
    if isinstance(pixels, OnDisk):
        return f"{takes}: read out of {file}, for which files are decoded once"
    return f"{takes}: decoded whenever they are taken"


class _Reading:
    """The reading of images that were found, step by step."""

    def __init__(
        self,
        source: Source,
        found: Found,
        progress: Progress | None,
        where: Where,
        limit: int,
        conditions: bool,
    ) -> None:
        self._source, self._found, self._progress = source, found, progress
        self._where, self._limit, self._conditions = where, limit, conditions
        self._broken: dict[Item, Unreadable] = {path: Unreadable(reason) for path, reason in found.unreadable}

    def read(self) -> Read:
        """All steps."""
        headers, broken = attempt(lambda item: read_header(item, self._source), self._found.files)
        self._fail(broken)
        white, range_read, problems, broken = find_white(self._source, headers)
        self._fail(broken)
        self._source = dataclasses.replace(self._source, white=white)
        # before anything is decoded: what changes meanwhile is noticed the next time
        key = cache.key_of(self._source, self._found.files, self._found.containers)
        problems += size_problems(self._source, headers)
        if not self._conditions:
            problems += mode_problems(self._source, headers)
        left = [item for item in headers if item not in self._broken]
        if problems or not left:  # decoded nevertheless, so that whatever is wrong is said at once
            self._check(left)
            raise self._refusal(problems)
        size = self._source.size or next((headers[item].height, headers[item].width) for item in left)
        channels = self._channels([headers[item] for item in left])
        pixels, items = self._pixels(left, size, channels)
        if self._broken and not (self._source.skip_broken and items):
            raise self._refusal([])
        seen = {item: headers[item] for item in items}
        notes = [
            summary(self._source, self._found, list(seen.values()), size, channels, self._conditions),
            self._skipped(),
            range_read,
            None if pixels is None else self._of_one_colour(pixels, list(seen.values())),
        ]
        written = tuple(note for note in notes if note)
        if self._where.first and pixels is None:
            self._source = dataclasses.replace(self._source, identity="files")
        skipped = frozenset(stem_of(item, self._source.path) for item in self._broken)
        if pixels is None:
            elsewhere = self._elsewhere(items, size, channels, key, written)
            place = _place(elsewhere, self._where.keep)
            return Read(elsewhere, self._source, (*written, place), None, items, seen, skipped)
        store = InMemory(pixels, identity_of(self._source, items))
        # what was left out is looked at again the next time: a small cache does not say which
        return Read(store, self._source, written, None if skipped else key, items, seen, skipped)

    def _of_one_colour(self, images: NDArray[np.uint8], headers: Sequence[Header]) -> str | None:
        """A line about images that are nothing but background, such as a white drawing on white."""
        if images.shape[-1] == 4 or self._source.reading == 1:
            return None
        layered = [image for image, header in zip(images, headers, strict=True) if header.transparent]
        lost = sum(bool((image == image[0, 0]).all()) for image in layered)
        if not lost:
            return None
        name = colour_name(self._source.background)
        return (
            f"{lost} of the {len(layered)} images with transparency are of one colour on {name}: --background sets "
            "another, --channels 4 keeps what is transparent"
        )

    def _fail(self, broken: Mapping[Item, Unreadable]) -> None:
        for item, error in broken.items():
            self._broken.setdefault(item, error)

    def _check(self, items: Sequence[Item]) -> None:
        self._fail(attempt(lambda item: check_image(item, self._source), items)[1])

    def _channels(self, headers: Sequence[Header]) -> int:
        if self._conditions:
            return 3 if any(channels_of(header) != 1 for header in headers) else 1
        return self._source.channels or channels_of(headers[0])

    def _decoded(self, item: Item, size: tuple[int, int], channels: int) -> NDArray[np.uint8]:
        return read_image(item, size, channels, self._source, bicubic=self._conditions)

    def _pixels(
        self, items: list[Item], size: tuple[int, int], channels: int
    ) -> tuple[NDArray[np.uint8] | None, tuple[Item, ...]]:
        """The pixels, or None if they do not fit into memory; and the images that can be read."""
        if len(items) * size[0] * size[1] * channels > self._limit:
            if self._source.skip_broken:  # how many are left has to be known before the first is written
                self._check(items)
            return None, tuple(item for item in items if item not in self._broken)
        images = np.empty((len(items), *size, channels), np.uint8)

        def decode(index: int) -> None:
            images[index] = self._decoded(items[index], size, channels)

        _, undecoded = attempt(decode, range(len(items)), self._progress)
        self._fail({items[index]: error for index, error in undecoded.items()})
        whole = np.array([item not in self._broken for item in items])
        return (images if whole.all() else images[whole]), tuple(item for item in items if item not in self._broken)

    def _elsewhere(
        self, items: Sequence[Item], size: tuple[int, int], channels: int, key: str, notes: tuple[str, ...]
    ) -> Pixels:
        """Pixels that do not fit into memory: written to the run, or decoded whenever they are taken."""
        source = self._source
        identity = identity_of(source, items)
        if self._where.keep is None:
            if self._found.in_order:
                raise DataError(
                    f"{source.path}: {len(items):,} images that do not fit into memory and can only be read in order",
                    note="they lie in groups of rows, of which each would be unpacked for every image",
                    hint="without --no-cache, their pixels are kept in the run",
                )
            return Decoding(items, size, channels, source, self._conditions, identity, self._progress)
        failed: dict[Item, Unreadable] = {}

        def decoded() -> Iterator[NDArray[np.uint8]]:
            blank = np.zeros((*size, channels), np.uint8)

            def tried(item: Item) -> NDArray[np.uint8]:
                try:
                    return self._decoded(item, size, channels)
                except Unreadable as error:
                    failed[item] = error
                    return blank

            for count, image in enumerate(in_threads(tried, items), start=1):
                yield image
                if self._progress is not None:
                    self._progress(count, len(items))
            if failed:
                self._fail(failed)
                raise self._refusal([])

        skipped = [name_of(item, source.path) for item in self._broken]
        file = self._where.keep
        make_folder(file.parent)
        cache.write(file, key, (len(items), *size, channels), decoded(), notes, skipped)
        return OnDisk(slots_of_npz(file)["images"], identity=identity)

    def _skipped(self) -> str | None:
        if not self._broken:
            return None
        names = [f"{name} ({self._broken[item]})" for item, name in self._names()]
        more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return f"left out, since they cannot be read (--skip-broken): {', '.join(names[:_NAMED])}{more}"

    def _names(self) -> list[tuple[Item, str]]:
        named = ((item, name_of(item, self._source.path)) for item in self._broken)
        return sorted(named, key=lambda pair: pair[1])

    def _refusal(self, problems: Sequence[Problem]) -> DataError:
        """One error for everything that is wrong."""
        facts, notes, hints = [p.fact for p in problems], [p.note for p in problems], [p.hint for p in problems]
        items: list[str] = []
        place = str(self._source.path)
        broken, names = self._broken, self._names()
        count = len(self._found.files) + len(self._found.unreadable)
        if len(broken) == 1 and not problems:
            ((item, name),) = names
            place = str(item) if isinstance(item, Path) else f"{place}: {name}"
            facts.append("not an image that can be read")
            notes.append(str(broken[item]))
        elif broken:
            facts.append(f"{len(broken)} of {count} files cannot be read as images")
            items = [f"{name}: {broken[item]}" for item, name in names]
        large = [error.megapixels for error in broken.values() if error.megapixels is not None]
        if large:
            trusted = "the file" if len(large) == 1 else "the files"
            hints.append(f"--max-megapixels {max(large)} (ddpmx train), if you trust {trusted}")
        if len(broken) > len(large):
            it = "it" if len(broken) == 1 else "them"
            hints.append(f"remove {it} from the folder, replace {it}, or leave {it} out by --skip-broken (ddpmx train)")
        return DataError(
            f"{place}: {'; '.join(facts)}", note="; ".join(notes) or None, hint="; ".join(hints), items=items
        )


def identity_of(source: Source, items: Sequence[Item]) -> bytes | None:
    """What images are known by if that is not their pixels: the settings, and of each file its name, size and both ends.

    Raises:
        DataError: a file cannot be read any more.
    """
    if source.identity == "pixels":
        return None
    kept = ("size", "channels", "background", "white", "reading")
    values = source.to_json()
    digest = hashlib.sha256(json.dumps([values[name] for name in kept]).encode())
    try:
        for ends in in_threads(lambda item: ends_of(item, source.path), items):
            digest.update(ends)
    except OSError as error:
        raise DataError(
            f"{source.path}: images can no longer be read", note=str(error)[:200], hint="put them back as they were"
        ) from error
    return digest.digest()
