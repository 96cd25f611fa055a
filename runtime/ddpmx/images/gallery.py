"""Writes a folder of generated images: 00000.png, 00001.png, …, a grid, an animation. All of it, or nothing."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpmx.diffusion.samplers import Table
from ddpmx.errors import DdpmxError, InputError, OutputError
from ddpmx.formats.atomic import exchange, make_folder, staging, write_synced
from ddpmx.formats.envelope import parse_json
from ddpmx.formats.spec import ModelSpec
from ddpmx.images import writers
from ddpmx.images.origin import Origin, check_not_another_s, comment, difference, is_of_a_task
from ddpmx.sampling.chain import Preview
from ddpmx.sampling.pixels import to_nhwc

FRAMES = 48
"""Most frames of an animation."""

SHOWN = 64
"""Most images in an animation, or in a strip."""

GRID, ANIMATION, STRIP = "grid.png", "x0.gif", "strip.png"
_SHEETS = (GRID, ANIMATION, STRIP)

RUN = "run.json"
"""In a folder that is filled in parts, by several processes: which run it is, see :mod:`ddpmx.scale.work`."""

_NUMBERED = re.compile(r"[0-9]{5,}\.png", re.ASCII)
_OTHER_PICTURES = (".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif")


def check_drawable(spec: ModelSpec) -> None:
    """Check that the model's images can be saved as PNGs, before time is spent on generating them.

    Raises:
        InputError: they do not have 1, 3 or 4 channels.
    """
    if spec.shape[0] not in (1, 3, 4):
        raise InputError(
            f"the model's images have {spec.shape[0]} channels, and a PNG has 1, 3 or 4",
            hint="ddpmx.load(path).generate(n) returns them as an array",
        )


class Animation:
    """Collects x̂_0 of the first images at up to :data:`FRAMES` steps of the chain. Pass it to ``generate`` as ``preview``.

    Args:
        spec: the model.
        table: the chain's table, from ``Pipeline.table``.
        n: how many images are generated; the first :data:`SHOWN` of them are shown.
    """

    def __init__(self, spec: ModelSpec, table: Table, n: int) -> None:
        channels, height, width = spec.shape
        picked = np.unique(np.linspace(0, len(table) - 1, min(FRAMES, len(table))).round().astype(int))
        self._slots = {int(table.timesteps[index]): slot for slot, index in enumerate(picked)}
        self._frames = np.zeros((len(picked), min(n, SHOWN), height, width, channels), np.uint8)

    def __call__(self, start: int, step: Preview) -> None:
        """Keep the step if it is one of the frames."""
        slot, room = self._slots.get(step.t), self._frames.shape[1] - start
        if slot is not None and room > 0:
            shown = to_nhwc(step.x0[:room])
            self._frames[slot, start : start + len(shown)] = shown

    def sheets(self) -> list[NDArray[np.uint8]]:
        """One grid per frame, uint8 [H', W', C] each."""
        return [writers.grid(frame) for frame in self._frames]


def targets(folder: Path, n: int, *, first: int, grid: bool, animated: bool, strip: bool = False) -> list[Path]:
    """The files that :func:`save_gallery` writes."""
    images = [writers.image_path(folder, index) for index in range(first, first + n)]
    return images + [folder / GRID] * grid + [folder / ANIMATION] * animated + [folder / STRIP] * strip


def is_picture(out: Path) -> bool:
    """Whether ``out`` is the name of one picture, and not of a folder.

    Raises:
        InputError: of a picture in another format than PNG.
    """
    suffix = out.suffix.lower()
    if out.is_dir() or suffix not in (".png", *_OTHER_PICTURES):
        return False
    if suffix != ".png":
        raise InputError(f"{out}: pictures are written as PNG", hint=f"{out.with_suffix('.png')}, or a folder")
    return True


def save_picture(path: Path, drawn: NDArray[np.uint8], *, grid: bool = False, origin: Origin | None = None) -> Path:
    """Write one image, or with ``grid`` all of them on one sheet, to one PNG.

    Args:
        path: the file. It is replaced.
        drawn: uint8 [n, H, W, C]; without ``grid`` n = 1.
        grid: see above.
        origin: is written into the file.

    Raises:
        InputError: the images do not have 1, 3 or 4 channels.
        OutputError: the file could not be written.
    """
    text = {} if origin is None else origin.text(0, len(drawn))
    sheet = writers.grid(drawn) if grid else drawn[0]
    writers.save_png(path, sheet, zoom=writers.zoom_for(sheet.shape[1]) if grid else 1, text=text)
    return path


def check_pictures_replaceable(paths: Iterable[Path], model: str) -> None:
    """Refuse to overwrite pictures of another model or of somebody else, before time is spent on new ones.

    Args:
        paths: where the pictures go.
        model: what :func:`ddpmx.images.origin.model_hash` says of the model.

    Raises:
        OutputError: there is such a picture.
    """
    for path in paths:
        if path.is_file():
            check_not_another_s(path, model)


def earlier_images(folder: str | os.PathLike[str]) -> list[Path]:
    """The numbered images in ``folder``, in order."""
    with contextlib.suppress(OSError):
        found = [path for path in Path(folder).iterdir() if _NUMBERED.fullmatch(path.name) and path.is_file()]
        return sorted(found, key=lambda path: int(path.stem))
    return []


def other_runs(folder: Path, origin: Origin, n: int) -> list[Path]:
    """The pictures in ``folder`` that are not of the run ``origin``, whose ``n`` images are about to be drawn.

    A folder holds one run: the images of one seed, model and sampler, drawn in any number of parts.
    """
    pictures = [*earlier_images(folder), *(folder / name for name in _SHEETS if (folder / name).is_file())]
    return [path for path in pictures if difference(path, origin, n)]


def check_one_run(folder: Path, origin: Origin, n: int) -> None:
    """Refuse to draw images beside those of another run, from which nobody could tell them.

    Raises:
        OutputError: ``folder`` holds numbered images that are not of this run.
    """
    for path in other_runs(folder, origin, n):
        if path.name not in _SHEETS:
            raise OutputError(
                f"refusing to mix the images of two runs in {folder}",
                note=f"{path.name}: {difference(path, origin, n)}",
                hint="another --out, or --overwrite, which replaces all images of the other run",
            )


def check_not_in_parts(folder: Path) -> None:
    """Refuse to write among the images of a run that is drawn in parts. A ``run.json`` of somebody else says nothing.

    Raises:
        OutputError: ``folder`` holds one.
    """
    try:
        with (folder / RUN).open("rb") as stream:
            values = parse_json(stream.read(1 << 24))
    except (OSError, DdpmxError):
        return
    if isinstance(values, dict) and "ddpmx" in values and isinstance(values.get("run"), dict):
        raise OutputError(
            f"refusing to mix pictures with the run in {folder}, which is drawn in parts",
            note=f"its {RUN} says which run it is",
            hint="another folder; with --shard 0/1 `ddpmx generate` goes on with that run",
        )


def check_free(paths: Sequence[Path], origin: Origin, n: int, *, folder: Path | None = None) -> None:
    """Refuse to overwrite, or to draw beside, anything but pictures of the run ``origin``.

    Args:
        paths: the files to be written.
        origin: the run.
        n: how many images are drawn.
        folder: the folder of a whole run, None where ``paths`` are all that is written.

    Raises:
        OutputError: there are pictures of another model or run, or ddpmx has not drawn them.
    """
    check_pictures_replaceable(paths, origin.model)
    if folder is not None:
        check_not_in_parts(folder)
        check_one_run(folder, origin, n)
        for path in folder.glob("*.png"):
            if not _NUMBERED.fullmatch(path.name) and is_of_a_task(path):
                raise OutputError(
                    f"refusing to mix images with the pictures of a task in {folder}",
                    note=f"{path.name} is one of them",
                    hint="another --out",
                )
    for path in paths:
        if (folder is None or path.name in _SHEETS) and path.is_file() and (other := difference(path, origin, n)):
            raise OutputError(
                f"refusing to overwrite {path}: it is of another run", note=other, hint="another --out, or --overwrite"
            )


def save_gallery(
    folder: str | os.PathLike[str],
    drawn: NDArray[np.uint8],
    *,
    first: int = 0,
    grid: bool = False,
    animation: Animation | None = None,
    strip: NDArray[np.uint8] | None = None,
    origin: Origin | None = None,
    instead_of: Iterable[Path] = (),
) -> list[Path]:
    """Write images and, on request, a grid and an animation: all of them, or none. Files of the same names are replaced.

    Args:
        folder: created if it does not exist.
        drawn: uint8 [n, H, W, C].
        first: index of the first image, which is its file name.
        grid: also write ``grid.png``, all images on one sheet.
        animation: also write ``x0.gif``.
        strip: also write ``strip.png``: uint8 [k, n, H, W, C], k pictures of each image, side by side in a row, of
            the first :data:`SHOWN`.
        origin: is written into each file.
        instead_of: further files of the folder that go as the new ones come, see :func:`other_runs`; read when nobody else
            writes to the folder.

    Returns:
        The files written: the images in order, then the rest.

    Raises:
        OutputError: a file could not be written; then none was, and none is gone.
        InputError: the images do not have 1, 3 or 4 channels.
    """
    folder = make_folder(folder)
    files = targets(folder, len(drawn), first=first, grid=grid, animated=animation is not None, strip=strip is not None)
    for target in files:
        if target.is_dir():
            raise OutputError(f"{target}: is a folder, and a file is to be written there", hint="choose another folder")
    with staging(folder, folder) as part:
        for position, image in enumerate(drawn):
            text = None if origin is None else origin.text(position)
            write_synced(part / files[position].name, writers.png(image, text=text))
        whole = {} if origin is None else origin.text(0, len(drawn))
        if grid:
            sheet = writers.grid(drawn)
            data = writers.png(sheet, zoom=writers.zoom_for(sheet.shape[1]), text=whole)
            write_synced(part / GRID, data)
        if animation is not None:
            sheets = animation.sheets()
            zoom = writers.zoom_for(sheets[0].shape[1], at_least=256)
            write_synced(part / ANIMATION, writers.gif(sheets, zoom=zoom, comment=comment(whole)))
        if strip is not None:
            rows = strip[:, :SHOWN].swapaxes(0, 1)
            sheet = writers.grid(rows.reshape(-1, *rows.shape[2:]), columns=rows.shape[1])
            data = writers.png(sheet, zoom=writers.zoom_for(sheet.shape[1]), text=whole)
            write_synced(part / STRIP, data)
        exchange(folder, part, [file.name for file in files], instead_of=(path.name for path in instead_of))
    return files
