"""Which files of a folder are images: by what is in them, and with a line about everything that is left out."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from ddpm_export.training.images import cache
from ddpm_export.training.images.decode import PLUGINS, plugins
from ddpm_export.training.images.items import Item
from ddpm_export.training.images.source import READING
from ddpm_export.training.log import LOG
from ddpmx.images.gallery import ANIMATION, GRID, STRIP

SUFFIXES = frozenset(
    {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".pjpeg", ".pjp", ".mpo", ".bmp", ".dib", ".webp"}
    | {".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm"}
)
"""Names that promise an image. Such a file is read or refused, and never left out."""

_FIRST_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
"""Those of reading 1, see :data:`.source.READING`."""

_SIGNATURES = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|P[1-6Ff]\s+[#\d]|(?P<tiff>II[*+]\0|MM\0[*+])"
    rb"|....ftyp(?:(?P<avif>avif|avis)|(?P<heif>hei[cxms]|hev[cmsx]|mif1|msf1))",
    re.DOTALL,
)
PLUGIN_SUFFIXES = {".avif": "AVIF", ".heic": "HEIF", ".heif": "HEIF", ".hif": "HEIF"}
_TIFF = frozenset({"", ".tif", ".tiff"})
"""Cameras' raw files begin as TIFF does, and Pillow would read their thumbnails."""


def missing(plugin: str) -> str:
    """Why an image of this format is left out."""
    return f"pip install '{PLUGINS[plugin]}' reads them"


@dataclass
class Found:
    """The files of a folder.

    Attributes:
        files: the images, sorted.
        containers: the files in which images lie that are no files.
        in_order: whether they can only be read one after another, in order.
        unreadable: what should be read and cannot be, each with the reason.
        left_out: what is no image, by the reason.
    """

    files: list[Item] = field(default_factory=list)
    containers: list[Path] = field(default_factory=list)
    in_order: bool = False
    unreadable: list[tuple[Item, str]] = field(default_factory=list)
    left_out: dict[str, list[PurePath]] = field(default_factory=dict)

    def leave_out(self, path: PurePath, why: str) -> None:
        """Note that ``path`` is not read."""
        self.left_out.setdefault(why, []).append(path)

    def describe(self) -> str | None:
        """What is left out and why, as the end of a line, or None if nothing is."""
        parts = []
        for why, paths in sorted(self.left_out.items(), key=lambda pair: pair[0] in _WITH_NAMES):
            if why == NOT_IMAGES or why.startswith("pip install"):
                kinds = Counter(path.suffix.lower() or "without a suffix" for path in paths)
                parts += [f"{n} {kind}" for kind, n in kinds.most_common(6)]
                if len(kinds) > 6:
                    parts.append(f"{sum(n for _, n in kinds.most_common()[6:])} of other kinds")
                if why != NOT_IMAGES:
                    parts[-1] += f" ({why})"
                elif len(paths) == 1:
                    parts[-1] += f" ({paths[0].name})"
            else:
                named = ", ".join(path.name for path in paths[:3])
                parts.append(f"{len(paths)} {why} ({named}{', …' if len(paths) > 3 else ''})")
        return f"not read: {', '.join(parts)}" if parts else None


NOT_IMAGES = "no images"
HIDDEN = "hidden by a dot"
_NOWHERE = "links to nothing"
_AGAIN = "other names of a folder that is read already"
_CLOSED = "not readable"
_GRID = "pictures that a run has drawn"
_SHEET = "sheets of the images beside them"
_WITH_NAMES = (HIDDEN, _NOWHERE, _AGAIN, _CLOSED, _GRID, _SHEET)
_RUN_PICTURES = re.compile(r"(data|curves)\.png")
_GRID_NAME = re.compile(r"grid-[0-9]{8,}\.png", re.ASCII)
_GENERATED = re.compile(r"[0-9]{5,}\.png", re.ASCII)
_SHEETS = frozenset({GRID, ANIMATION, STRIP})


def find_images(folder: Path, reading: int = READING) -> Found:
    """Every image below ``folder``, in subfolders and in folders that are linked there.

    A folder is read once, however many links lead to it: links that lead back to a folder above themselves would have no
    end, and several links to one would count its images several times. Links to single files are files like others.

    Args:
        folder: where to look.
        reading: the rules, see :data:`.source.READING`.
    """
    if reading == 1:
        return _find_by_suffix(folder)
    found = Found()
    seen: set[tuple[int, int]] = set()
    links = [folder]  # real folders come first, so that a folder keeps its own name
    while links:
        link = links.pop(0)
        folders = [link] if _enter(link, seen, found) else []
        while folders:
            _read_one(folders.pop(), folders, links, seen, found, reading)
    files = sorted(file for file in found.files if isinstance(file, Path))
    found.files = []
    for file in files:
        plugin = _plugin(file)
        if plugin is None or (reading > 2 and plugin in plugins()):
            found.files.append(file)
        else:
            found.leave_out(file, missing(plugin) if reading > 2 else NOT_IMAGES)
    return found


def _plugin(file: Path) -> str | None:
    """The one of :data:`PLUGINS` that an image needs."""
    suffix = file.suffix.lower()
    if suffix in PLUGIN_SUFFIXES or suffix not in SUFFIXES:
        with contextlib.suppress(OSError), file.open("rb") as stream:
            if match := _SIGNATURES.match(stream.read(16)):
                return "AVIF" if match["avif"] or suffix == ".avif" else "HEIF" if match["heif"] else None
    return None


def _find_by_suffix(folder: Path) -> Found:
    """The images of reading 1: those with one of ten suffixes, without linked folders."""
    return Found(
        [
            file
            for file in sorted(folder.rglob("*"))
            if file.suffix.lower() in _FIRST_SUFFIXES
            and not file.is_dir()
            and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        ]
    )


def _read_one(
    folder: Path, folders: list[Path], links: list[Path], seen: set[tuple[int, int]], found: Found, reading: int
) -> None:
    """Sort the entries of one folder into files, real subfolders, links to folders, and what is left out."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        found.unreadable.append((folder, error.strerror or str(error)))
        return
    drawn = _drawn_by_a_run(folder)
    sheets = _SHEETS if reading > 3 and any(map(_GENERATED.fullmatch, names)) else ()
    for name in names:
        path = folder / name
        try:
            is_folder = path.is_dir()
        except OSError as error:  # a folder that may be listed and not entered
            found.unreadable.append((path, error.strerror or str(error)))
            continue
        if name.startswith("."):
            found.leave_out(path, HIDDEN)
        elif drawn and drawn.fullmatch(name):
            found.leave_out(path, _GRID)
        elif name in sheets:
            found.leave_out(path, _SHEET)
        elif is_folder:
            if path.is_symlink():
                links.append(path)
            elif _enter(path, seen, found):
                folders.append(path)
        elif not os.path.exists(path):  # False for a link in a circle as well
            if path.suffix.lower() in SUFFIXES:
                found.unreadable.append((path, "a link to nothing"))
            else:
                found.leave_out(path, _NOWHERE)
        elif path.suffix.lower() in SUFFIXES:
            found.files.append(path)
        else:
            try:
                _by_content(path, found)
            except OSError:
                found.leave_out(path, _CLOSED)


def _drawn_by_a_run(folder: Path) -> re.Pattern[str] | None:
    """The names of what training draws here: a run may lie among its images, and must not be trained on what it drew."""
    real = Path(os.path.realpath(folder))
    if _is_run(real):
        return _RUN_PICTURES
    return _GRID_NAME if real.name == "samples" and _is_run(real.parent) else None


def _is_run(folder: Path) -> bool:
    try:
        return (folder / "checkpoints").is_dir() or (folder / cache.NAME).is_file() or (folder / LOG).is_file()
    except OSError:  # a folder that may be listed and not entered
        return False


def _by_content(path: Path, found: Found) -> None:
    """Look at how a file begins. A pipe, which could block, is not opened."""
    match = None
    if path.is_file():
        with path.open("rb") as stream:
            match = _SIGNATURES.match(stream.read(16))
    if match is None or (match["tiff"] and path.suffix.lower() not in _TIFF):
        found.leave_out(path, NOT_IMAGES)
    else:
        found.files.append(path)


def _enter(folder: Path, seen: set[tuple[int, int]], found: Found) -> bool:
    """Whether a folder is met for the first time; otherwise it is noted as left out."""
    try:
        status = os.stat(folder)
    except OSError:
        return True  # listing it says why
    identity = (status.st_dev, status.st_ino)
    if identity in seen:
        found.leave_out(folder, _AGAIN)
        return False
    seen.add(identity)
    return True
