"""Writes a folder of generated images: 00000.png, 00001.png, …, a grid, an animation. All of it, or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpmx.diffusion.samplers import Table
from ddpmx.errors import InputError, OutputError
from ddpmx.formats.atomic import make_folder, write_error
from ddpmx.formats.spec import ModelSpec
from ddpmx.images import writers
from ddpmx.images.origin import Origin, check_not_another_s, comment
from ddpmx.sampling.chain import Preview
from ddpmx.sampling.pixels import to_nhwc

FRAMES = 48
"""Most frames of an animation."""

SHOWN = 64
"""Most images in an animation."""


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


def targets(folder: Path, n: int, *, first: int, grid: bool, animated: bool) -> list[Path]:
    """The files that :func:`save_gallery` writes."""
    images = [writers.image_path(folder, index) for index in range(first, first + n)]
    return images + [folder / "grid.png"] * grid + [folder / "x0.gif"] * animated


def check_replaceable(paths: Iterable[Path], model: str) -> None:
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


def save_grid(path: str | os.PathLike[str], drawn: NDArray[np.uint8], text: Mapping[str, str]) -> None:
    """Write uint8 [n, H, W, C] images on one sheet, enlarged to be looked at.

    Raises:
        InputError: they do not have 1, 3 or 4 channels.
        OutputError: the file could not be written.
    """
    sheet = writers.grid(drawn)
    writers.save_png(path, sheet, zoom=writers.zoom_for(sheet.shape[1]), text=text)


def save_gallery(
    folder: str | os.PathLike[str],
    drawn: NDArray[np.uint8],
    *,
    first: int = 0,
    grid: bool = False,
    animation: Animation | None = None,
    origin: Origin | None = None,
) -> list[Path]:
    """Write images and, on request, a grid and an animation. Files of the same names are replaced.

    Args:
        folder: created if it does not exist.
        drawn: uint8 [n, H, W, C].
        first: index of the first image, which is its file name.
        grid: also write ``grid.png``, all images on one sheet.
        animation: also write ``x0.gif``.
        origin: is written into each file.

    Returns:
        The files written: the images in order, then the rest.

    Raises:
        OutputError: a file could not be written; then none was.
        InputError: the images do not have 1, 3 or 4 channels.
    """
    folder = make_folder(folder)
    for target in targets(folder, len(drawn), first=first, grid=grid, animated=animation is not None):
        if target.is_dir():
            raise OutputError(f"{target}: is a folder, and a file is to be written there", hint="choose another folder")
    try:
        staging = Path(tempfile.mkdtemp(prefix=".part-", dir=folder))
    except OSError as error:
        raise write_error(folder, error) from error
    try:
        names = []
        for position, image in enumerate(drawn):
            names.append(writers.image_path(staging, first + position))
            writers.save_png(names[-1], image, text=None if origin is None else origin.text(position))
        whole = {} if origin is None else origin.text(0, len(drawn))
        if grid:
            names.append(staging / "grid.png")
            save_grid(names[-1], drawn, whole)
        if animation is not None:
            names.append(staging / "x0.gif")
            sheets = animation.sheets()
            zoom = writers.zoom_for(sheets[0].shape[1], at_least=256)
            writers.save_gif(names[-1], sheets, zoom=zoom, comment=comment(whole))
        for name in names:
            os.replace(name, folder / name.name)
        return [folder / name.name for name in names]
    except OutputError as error:  # it names the temporary folder
        raise OutputError(f"{folder}: cannot be written", note=error.note, hint=error.hint) from error
    except OSError as error:
        raise write_error(folder, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
