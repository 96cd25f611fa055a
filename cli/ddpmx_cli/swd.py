"""`ddpmx eval swd`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from typer import Argument, Option

from ddpmx_cli.console import busy, counting, plain, say
from ddpmx_cli.data import read_pictures

EXAMPLES = """
Examples:\n
  ddpmx eval swd samples/ photos/\n
  ddpmx eval swd samples/ images.npz --json\n
"""


Samples = Annotated[Path, Argument(help="What a model has drawn: a folder, an .npz or .npy, or .tar shards.")]
Reference = Annotated[Path, Argument(help="Real images of the same size, in the same forms.")]


def swd(
    samples: Samples,
    reference: Reference,
    seed: Annotated[int, Option(help="Of the patches' places and the directions, 0 … 2**64 − 1.")] = 0,
    as_json: Annotated[bool, Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """A light judge, which is not FID: how far patches of samples are from those of real images, at each scale."""
    from ddpmx.images.swd import sliced_wasserstein

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
    """All images of a folder or an array, uint8 [n, H, W, 3]."""
    with counting("reading images") as progress:
        images = read_pictures(path, progress=progress).images
    return np.ascontiguousarray(np.broadcast_to(images, (*images.shape[:3], 3)))
