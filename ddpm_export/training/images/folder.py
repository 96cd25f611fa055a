"""A folder of images → uint8 [N, H, W, C], or one error that names everything that is wrong with it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ddpm_export.training.images import cache
from ddpm_export.training.images.decode import (
    BICUBIC,
    CHANNELS,
    LANCZOS,
    Header,
    Unreadable,
    check_image,
    own_limit,
    read_header,
    read_image,
    read_range,
)
from ddpm_export.training.images.find import Found, find_by_suffix, find_images
from ddpm_export.training.images.source import Source
from ddpm_export.training.images.threads import in_threads
from ddpmx.errors import DataError

MAX_BYTES = 8 << 30
"""All images are kept in memory as uint8, up to this much."""

WHITES = (255, 1023, 4095, 16383, 65535)
"""Full scale of 8, 10, 12, 14 and 16 bits, which sensors and scanners have."""

Progress = Callable[[int, int], None]
_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class Read:
    """What came of a folder.

    Attributes:
        images: uint8 [N, H, W, C], in the order of the files' names.
        source: with ``white`` as it was found.
        notes: what a user should know before training: what was left out, and how numbers were read.
        key: of the cache.
        files: where each image is from.
        headers: of the files that were looked at: all, or none where the cache had the pixels.
    """

    images: NDArray[np.uint8]
    source: Source
    notes: tuple[str, ...]
    key: str
    files: tuple[Path, ...]
    headers: Mapping[Path, Header] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.images.shape[1], self.images.shape[2]


def read_folder(source: Source, progress: Progress | None = None, cached: Path | None = None) -> Read:
    """Read every image of ``source.path``.

    Args:
        source: where the images are and how to read them.
        progress: called with (images read, images in all).
        cached: a cache that a run has of it, see :mod:`.cache`.

    Raises:
        DataError: there are none, they do not fit together, or some cannot be read.
    """
    folder = source.path
    found = find_images(folder) if source.reading > 1 else find_by_suffix(folder)
    if not found.files and not found.unreadable:
        raise DataError(
            f"{folder}: no images in this folder",
            note=found.describe(),
            hint="it reads PNG, JPEG, BMP, WebP, TIFF, GIF and PPM (.png, .jpg, …)",
        )
    if cached is not None and not found.unreadable:
        key = cache.key_of(source, found.files)
        if kept := cache.load(cached, key):
            return Read(kept[0], source, kept[1], key, tuple(found.files))
    with own_limit():
        return _read(source, found, progress)


def read_conditions(source: Source, found: Found, progress: Progress | None = None) -> Read:
    """Read condition images: grey if all of them are, RGB otherwise; those that are smaller are enlarged, bicubic.

    Args:
        source: where they are, with ``size``.
        found: those that are paired with an image.
        progress: called with (images read, images in all).

    Raises:
        DataError: some cannot be read.
    """
    with own_limit():
        return _read(source, found, progress, conditions=True)


@dataclass(frozen=True)
class _Problem:
    """Something that is wrong with the folder, and what to do about it."""

    fact: str
    note: str
    hint: str


_Broken = list[tuple[Path, Unreadable]]


def _read(source: Source, found: Found, progress: Progress | None, *, conditions: bool = False) -> Read:
    headers, broken = _attempt(lambda file: read_header(file, source), found.files)
    broken = [*((path, Unreadable(reason)) for path, reason in found.unreadable), *broken]
    white, range_read, problems, more = _white(source, headers)
    source = dataclasses.replace(source, white=white)
    broken += more
    problems = [*_sizes(source, headers), *([] if conditions else _modes(source, headers)), *problems]
    if problems or not headers:  # decoded nevertheless, so that whatever is wrong is said at once
        known = {path for path, _ in broken}
        _, more = _attempt(lambda file: check_image(file, source), [file for file in headers if file not in known])
        raise _refusal(source.path, len(found.files) + len(found.unreadable), problems, broken + more)
    size = source.size or next((header.height, header.width) for header in headers.values())
    if conditions:
        channels = 3 if any(_channels(header) != 1 for header in headers.values()) else 1
    else:
        channels = source.channels or next(_channels(header) for header in headers.values())
    total = len(headers) * size[0] * size[1] * channels
    if total > MAX_BYTES:
        raise DataError(
            f"{source.path}: {len(headers)} images of {size[0]}×{size[1]} take {total / 2**30:.1f} GiB",
            note=f"all are kept in memory, up to {MAX_BYTES / 2**30:.0f} GiB",
            hint="a smaller --size, or fewer images",
        )
    files = list(headers)
    key = cache.key_of(source, found.files)  # before they are read: what changes meanwhile is noticed the next time
    images = np.empty((len(files), *size, channels), np.uint8)

    def decode(index: int) -> None:
        images[index] = read_image(files[index], size, channels, source, BICUBIC if conditions else LANCZOS)

    _, undecoded = _attempt(decode, range(len(files)), progress)
    known = {path for path, _ in broken}
    broken += [(files[index], error) for index, error in undecoded if files[index] not in known]
    if broken:
        raise _refusal(source.path, len(found.files) + len(found.unreadable), [], broken)
    notes = [found.describe(), *_notes(source, channels, list(headers.values())), range_read]
    return Read(images, source, tuple(note for note in notes if note), key, tuple(files), headers)


def _attempt(
    work: Callable[[_In], _Out], items: Sequence[_In], progress: Progress | None = None
) -> tuple[dict[_In, _Out], list[tuple[_In, Unreadable]]]:
    """The results of ``work`` by item, and what was unreadable."""

    def tried(item: _In) -> _Out | Unreadable:
        try:
            return work(item)
        except Unreadable as error:
            return error

    done: dict[_In, _Out] = {}
    failed: list[tuple[_In, Unreadable]] = []
    for count, (item, result) in enumerate(zip(items, in_threads(tried, items), strict=True), start=1):
        if isinstance(result, Unreadable):
            failed.append((item, result))
        else:
            done[item] = result
        if progress is not None:
            progress(count, len(items))
    return done, failed


def _channels(header: Header) -> int:
    return CHANNELS.get(header.mode, 3)


def _sizes(source: Source, headers: Mapping[Path, Header]) -> list[_Problem]:
    sizes = Counter((header.height, header.width) for header in headers.values())
    if source.size is not None or len(sizes) <= 1:
        return []
    common = ", ".join(f"{n} of {h}×{w}" for (h, w), n in sizes.most_common(3))
    return [
        _Problem(
            f"the images have {len(sizes)} different sizes",
            f"height × width: {common}{', …' if len(sizes) > 3 else ''}",
            "--size 64 (or 64x48, height first) crops and resizes them all",
        )
    ]


def _modes(source: Source, headers: Mapping[Path, Header]) -> list[_Problem]:
    if source.channels is not None or len({_channels(header) for header in headers.values()}) <= 1:
        return []
    modes = Counter(header.mode for header in headers.values())
    transparent = any(header.transparent for header in headers.values())
    on_white = "; with 1 or 3, transparent parts become white (or --background)" if transparent else ""
    return [
        _Problem(
            "the images have different modes",
            ", ".join(f"{n} {mode}" for mode, n in modes.most_common(4)),
            f"--channels 1 (grey), 3 (RGB) or 4 (RGBA) converts them all{on_white}",
        )
    ]


def _white(source: Source, headers: Mapping[Path, Header]) -> tuple[float | None, str | None, list[_Problem], _Broken]:
    """The number that is white in greys of more than 8 bits, a line about it, and what is in the way.

    A file of 16 bits may hold 10, 12 or 14 of a sensor; read as 65535, its white would be nearly black. So all are looked
    at, and white is the full scale of as many bits as the largest number has; or 65535, if they are 8 bits that were
    multiplied by 257.
    """
    greys = [file for file, header in headers.items() if header.wide_grey]
    colours = [file for file, header in headers.items() if header.wide_colour]
    if source.reading == 1:
        numbers = [file for file in greys if headers[file].mode != "I;16"]
        return None, None, [_unknown_white(numbers, "")] if numbers else [], []
    ranges, broken = _attempt(lambda file: read_range(file, source), [*greys, *colours])
    problems = []
    upper = max((ranges[file][1] for file in colours if file in ranges), default=255)
    if 0 < upper < 64:
        problems.append(
            _Problem(
                f"colours of 16 bits of which the upper 8 reach {upper:.0f} of 255",
                f"{len(colours)} images that hold fewer than 16 bits; Pillow keeps the upper 8",
                "save them with 8 bits per colour, or scale them to 0…65535",
            )
        )
    seen = [ranges[file] for file in greys if file in ranges]
    if not seen:
        return None, None, problems, broken
    least, most = min(low for low, *_ in seen), max(high for _, high, _ in seen)
    span = f"numbers from {least:g} to {most:g}"
    white = source.white
    if least < 0:
        problems.append(
            _Problem(
                "greys below 0",
                f"{span}, such as in {greys[0].name}",
                "save them so that black is 0, and name white by --white",
            )
        )
    elif white is None:
        numbers = [file for file in greys if headers[file].mode != "I;16"]
        white = next((full for full in WHITES if full >= most), None)
        if most > 255 and all(stretched for *_, stretched in seen):
            white = 65535
        if numbers or white is None or 0 < most < 16:
            problems.append(_unknown_white(numbers or greys, span))
    beyond = "; what is larger is white too" if white is not None and most > white else ""
    note = f"greys of more than 8 bits in {len(greys)} of {len(headers)} images: {span}, "
    note += f"white is {white or 0:g}{beyond} (--white sets it)"
    return white, note, problems, broken


def _unknown_white(files: Sequence[Path], span: str) -> _Problem:
    return _Problem(
        "greys of which the files do not say which number is white",
        f"{len(files)} images, such as {files[0].name}{span and ': '}{span}",
        "--white N (ddpmx train), the number that is white (black is 0): 1, 4095, 65535, …; or save them with 8 bits",
    )


def _notes(source: Source, channels: int, headers: Sequence[Header]) -> list[str]:
    notes = []
    if transparent := sum(header.transparent for header in headers):
        becomes = f"it becomes {colour_name(source.background)} (--background)"
        if channels == 4:
            becomes = "it stays, as the fourth channel (--channels 3 lays the images on white)"
        elif source.reading == 1:
            becomes = "this run was begun with the colours hidden under it; a new one lays the images on white"
        notes.append(f"transparency in {transparent} of {len(headers)} images: {becomes}")
    if frames := sum(header.frames for header in headers):
        notes.append(f"more than one image in {frames} of {len(headers)} files: the first of each is read")
    return notes


def colour_name(colour: tuple[int, int, int]) -> str:
    """A colour as text: white, black, or #rrggbb."""
    return {(255, 255, 255): "white", (0, 0, 0): "black"}.get(colour) or "#{:02x}{:02x}{:02x}".format(*colour)


def _refusal(folder: Path, count: int, problems: Sequence[_Problem], broken: _Broken) -> DataError:
    """One error for everything that is wrong."""
    facts, notes, hints = [p.fact for p in problems], [p.note for p in problems], [p.hint for p in problems]
    items: list[str] = []
    where = folder
    if len(broken) == 1 and not problems:
        where, reason = broken[0]
        facts.append("not an image that can be read")
        notes.append(str(reason))
    elif broken:
        facts.append(f"{len(broken)} of {count} files cannot be read as images")
        items = [f"{path.relative_to(folder)}: {error}" for path, error in sorted(broken, key=lambda pair: pair[0])]
    large = [error.megapixels for _, error in broken if error.megapixels is not None]
    if large:
        hints.append(
            f"--max-megapixels {max(large)} (ddpmx train), if you trust {'the file' if len(large) == 1 else 'the files'}"
        )
    if len(broken) > len(large):
        it = "it" if len(broken) == 1 else "them"
        hints.append(f"remove {it} from the folder, or replace {it}")
    return DataError(f"{where}: {'; '.join(facts)}", note="; ".join(notes) or None, hint="; ".join(hints), items=items)
