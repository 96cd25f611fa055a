"""Whether images go together: their sizes, their modes, the number that is white; and one line about all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ddpm_export.training.images.decode import CHANNELS, Header, Unreadable, read_range
from ddpm_export.training.images.find import Found
from ddpm_export.training.images.items import Item
from ddpm_export.training.images.source import Source
from ddpm_export.training.images.threads import in_threads

WHITES = (255, 1023, 4095, 16383, 65535)
"""Full scale of 8, 10, 12, 14 and 16 bits, which sensors and scanners have."""

Progress = Callable[[int, int], None]
_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with the folder, and what to do about it."""

    fact: str
    note: str
    hint: str


def attempt(
    work: Callable[[_In], _Out], items: Sequence[_In], progress: Progress | None = None
) -> tuple[dict[_In, _Out], dict[_In, Unreadable]]:
    """The results of ``work`` by item, and what was unreadable."""

    def tried(item: _In) -> _Out | Unreadable:
        try:
            return work(item)
        except Unreadable as error:
            return error

    done: dict[_In, _Out] = {}
    failed: dict[_In, Unreadable] = {}
    for count, (item, result) in enumerate(zip(items, in_threads(tried, items), strict=True), start=1):
        if isinstance(result, Unreadable):
            failed[item] = result
        else:
            done[item] = result
        if progress is not None:
            progress(count, len(items))
    return done, failed


def channels_of(header: Header) -> int:
    """The channels that an image has by itself: 1, 3 or 4."""
    return CHANNELS.get(header.mode, 3)


def size_problems(source: Source, headers: Mapping[Item, Header]) -> list[Problem]:
    """That the images have different sizes, and none was asked for."""
    sizes = Counter((header.height, header.width) for header in headers.values())
    if source.size is not None or len(sizes) <= 1:
        return []
    common = ", ".join(f"{n} of {h}×{w}" for (h, w), n in sizes.most_common(3))
    return [
        Problem(
            f"the images have {len(sizes)} different sizes",
            f"height × width: {common}{', …' if len(sizes) > 3 else ''}",
            "--size 64 (or 64x48, height first) crops and resizes them all",
        )
    ]


def mode_problems(source: Source, headers: Mapping[Item, Header]) -> list[Problem]:
    """That some are grey and others coloured, and no number of channels was asked for."""
    if source.channels is not None or len({channels_of(header) for header in headers.values()}) <= 1:
        return []
    modes = Counter(header.mode for header in headers.values())
    transparent = any(header.transparent for header in headers.values())
    on_white = "; with 1 or 3, transparent parts become white (or --background)" if transparent else ""
    return [
        Problem(
            "the images have different modes",
            ", ".join(f"{n} {mode}" for mode, n in modes.most_common(4)),
            f"--channels 1 (grey), 3 (RGB) or 4 (RGBA) converts them all{on_white}",
        )
    ]


def find_white(
    source: Source, headers: Mapping[Item, Header]
) -> tuple[float | None, str | None, list[Problem], dict[Item, Unreadable]]:
    """The number that is white in greys of more than 8 bits, a line about it, and what is in the way.

    A file of 16 bits may hold 10, 12 or 14 of a sensor; read as 65535, its white would be nearly black. So all are looked
    at, and white is the full scale of as many bits as the largest number has; or 65535, if they are 8 bits that were
    multiplied by 257.
    """
    greys = [file for file, header in headers.items() if header.wide_grey]
    colours = [file for file, header in headers.items() if header.wide_colour]
    if source.reading == 1:
        numbers = [file for file in greys if headers[file].mode != "I;16"]
        return None, None, [_unknown_white(numbers, "")] if numbers else [], {}
    ranges, broken = attempt(lambda file: read_range(file, source), [*greys, *colours])
    problems = []
    upper = max((ranges[file][1] for file in colours if file in ranges), default=255)
    if 0 < upper < 64:
        problems.append(
            Problem(
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
            Problem(
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


def _unknown_white(files: Sequence[Item], span: str) -> Problem:
    return Problem(
        "greys of which the files do not say which number is white",
        f"{len(files)} images, such as {files[0].name}{span and ': '}{span}",
        "--white N (ddpmx train), the number that is white (black is 0): 1, 4095, 65535, …; or save them with 8 bits",
    )


def summary(
    source: Source, found: Found, headers: Sequence[Header], size: tuple[int, int], channels: int, conditions: bool
) -> str | None:
    """One line about all images, or None if nothing is to be said: what is odd about how many, and what was not read."""
    facts = []
    if transparent := sum(header.transparent for header in headers):
        becomes = f"it becomes {colour_name(source.background)}, --background"
        if channels == 4:
            becomes = "it stays, as the fourth channel: --channels 3 lays the images on white"
        elif source.reading == 1:
            becomes = "this run was begun with the colours hidden under it; a new one lays the images on white"
        facts.append(f"{transparent} with transparency ({becomes})")
    if frames := sum(header.frames for header in headers):
        facts.append(f"{frames} animated (first frame)")
    # conditions have a line of their own about that
    if not conditions and (small := sum(max(size[0] / h.height, size[1] / h.width) > 1 for h in headers)):
        facts.append(f"{small} smaller than {size[0]}×{size[1]} (enlarged)")
    left_out = found.describe()
    if not facts and left_out is None:
        return None
    line = f"{len(headers):,} image{'' if len(headers) == 1 else 's'}"
    if facts:
        line += f": {', '.join(facts)}"
    return line if left_out is None else f"{line}; {left_out}"


def colour_name(colour: tuple[int, int, int]) -> str:
    """A colour as text: white, black, or #rrggbb."""
    return {(255, 255, 255): "white", (0, 0, 0): "black"}.get(colour) or "#{:02x}{:02x}{:02x}".format(*colour)
