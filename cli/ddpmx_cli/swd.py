"""`ddpmx eval swd`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from typer import Argument, Option

from ddpmx.errors import DataError, FileFormatError
from ddpmx_cli.console import busy, plain, say

EXAMPLES = """
Examples:\n
  ddpmx eval swd samples/ photos/\n
  ddpmx eval swd samples/ images.npz --json\n
"""

_NUMBERED = re.compile(r"[0-9]{5,}\.png")
_MAX_BYTES = 4 << 30


def swd(
    samples: Annotated[Path, Argument(help="What a model has drawn: a folder of pictures, or an .npz.")],
    reference: Annotated[Path, Argument(help="Real images of the same size: a folder, or an .npz.")],
    seed: Annotated[int, Option(help="Of the patches' places and the directions, 0 … 2**64 − 1.")] = 0,
    as_json: Annotated[bool, Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """A light judge, which is not FID: how far patches of samples are from those of real images, at each scale."""
    from ddpmx.tasks.swd import sliced_wasserstein

    with busy("reading images"):
        mine, theirs = _images(samples), _images(reference)
    with busy("comparing patches"):
        found = sliced_wasserstein(mine, theirs, seed=seed)
        half = min(len(theirs) // 2, len(mine))
        floor = None if half < 2 else sliced_wasserstein(theirs[: 2 * half : 2], theirs[1 : 2 * half : 2], seed=seed)
    if as_json:
        values = {
            "swd": found.mean,
            "images": found.images,
            "by_size": dict(zip(map(str, found.sizes), found.distances, strict=True)),
            "halves_of_reference": None if floor is None else floor.mean,
            "halves_images": 0 if floor is None else floor.images,
            "seed": seed,
        }
        say(json.dumps(values, indent=2))
        return
    say(f"{plain(str(samples))} against {plain(str(reference))}: {found.images} images of each, seed {seed}")
    by_size = ", ".join(f"{size}: {value:.1f}" for size, value in zip(found.sizes, found.distances, strict=True))
    say(f"  sliced Wasserstein distance × 1000   {found.mean:.1f}   ({by_size})")
    if floor is not None:
        say(f"  two halves of the real ones          {floor.mean:.1f}   ({floor.images} images of each)")


def _images(path: Path) -> NDArray[np.uint8]:
    """All images of a folder or an array, uint8 [n, H, W, C]. Of what `generate` has written, the numbered ones."""
    if path.suffix.lower() == ".npz" and not path.is_dir():
        return _of_array(path)
    from ddpmx.images.pictures import opened

    if not path.is_dir():
        raise FileFormatError(f"{path}: no folder of pictures", hint="a folder, or an .npz")
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    files = [file for file in files if _NUMBERED.fullmatch(file.name)] or files
    found: list[NDArray[np.uint8]] = []
    faults: list[str] = []
    for file in files:
        try:
            pixels = np.asarray(opened(file).convert("RGB"))
            if found and pixels.shape != found[0].shape:
                faults.append(f"{file.name}: {pixels.shape[0]}×{pixels.shape[1]}")
                continue
            found.append(pixels)
        except (OSError, ValueError) as error:
            faults.append(f"{file.name}: {error}")
    if faults or not found:
        raise DataError(
            f"{path}: {len(faults)} of {len(files)} files cannot be compared"
            if files
            else f"{path}: no pictures in it",
            items=faults,
            hint="pictures of one size",
        )
    return np.stack(found)


def _of_array(path: Path) -> NDArray[np.uint8]:
    from ddpmx.formats.npz import read_npz

    images = [
        array
        for array in read_npz(path, max_bytes=_MAX_BYTES).values()
        if array.dtype == np.uint8 and array.ndim in (3, 4)
    ]
    if len(images) != 1:
        raise DataError(f"{path}: {len(images)} arrays are images", hint="one array, uint8 [n, H, W, C] or [n, H, W]")
    array = images[0] if images[0].ndim == 4 else images[0][..., None]
    if array.shape[3] not in (1, 3):
        raise DataError(f"{path}: images of {array.shape[3]} channels", hint="1 or 3")
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:3], 3)))
