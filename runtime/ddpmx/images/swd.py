"""A light judge of samples: the sliced Wasserstein distance between patches of two sets of images. It is not FID.

Karras et al. (2018, "Progressive Growing of GANs", §5), after Rabin et al. (2011): images become Laplacian pyramids, each
level gives patches of 7×7 pixels, and along random directions the sorted patches of both sets are compared. It sees what
patches are made of, at each scale, and not what the image as a whole shows; it needs NumPy alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddpmx.diffusion import noise
from ddpmx.diffusion.noise import Purpose, check_seed
from ddpmx.errors import InputError

Float32 = NDArray[np.float32]

SIDE = 7
"""Of a patch, in pixels."""

COARSEST = 16
"""The pyramid ends at this size."""

PATCHES, DIRECTIONS = 128, 512
"""For each image and level, and for each level: the paper's numbers."""

SCALE = 1000
"""Distances are stated times this, as in the paper."""

MOST_IMAGES = 1 << 14
_AT_ONCE = 64
"""Directions that are sorted at once: 64·n·128 float32 of memory."""


@dataclass(frozen=True)
class Distance:
    """How far two sets of images are apart.

    Attributes:
        images: how many of each set were compared.
        sizes: the larger side of each level of the pyramid, in pixels, finest first.
        distances: of each level, times 1000, as floats of at least 0.
    """

    images: int
    sizes: tuple[int, ...]
    distances: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the levels."""
        return float(np.mean(self.distances))


def sliced_wasserstein(
    images: NDArray[np.uint8],
    reference: NDArray[np.uint8],
    *,
    patches: int = PATCHES,
    directions: int = DIRECTIONS,
    seed: int = 0,
) -> Distance:
    """The distance of two sets of images, level by level. Of the larger set as many as the other has, spread over it.

    Patches are brought to mean 0 and deviation 1 in each channel by the reference's, so that distances do not grow with
    contrast. Two sets of the same kind are apart as well: compare with the distance of two halves of the reference.

    Args:
        images: uint8 [n, H, W, C], sides of 7 and more.
        reference: uint8 [m, H, W, C].
        patches: of each image and level.
        directions: of each level.
        seed: of the places and the directions.

    Raises:
        InputError: sets of other shapes, too small or too large, or a number out of its range.
    """
    seed = check_seed(seed)
    for name, value, most in (("patches", patches, 1 << 12), ("directions", directions, 1 << 14)):
        if type(value) is not int or not 1 <= value <= most:
            raise InputError(f"{name} must be a whole number from 1 to {most}, not {value!r}")
    sets = [np.asarray(each) for each in (images, reference)]
    for each in sets:
        if each.dtype != np.uint8 or each.ndim != 4 or min(each.shape[1:3], default=0) < SIDE or not each.shape[3]:
            raise InputError(
                f"images must be uint8 [n, H, W, C], H and W at least {SIDE}",
                note=f"they are {each.dtype} {[*each.shape]}",
            )
    if sets[0].shape[1:] != sets[1].shape[1:]:
        raise InputError(
            "images and reference differ in size or channels",
            note=f"{[*sets[0].shape[1:]]} and {[*sets[1].shape[1:]]} (height, width, channels)",
        )
    n = min(map(len, sets))
    if not 1 <= n <= MOST_IMAGES:
        raise InputError(f"1 to {MOST_IMAGES} images of each set are compared, and there are {n}")
    pyramids = [levels(_spread(each, n)) for each in sets]
    sizes, distances = [], []
    for number, (mine, theirs) in enumerate(zip(*pyramids, strict=True)):
        cut = [_patches(level, patches, seed, number) for level in (mine, theirs)]
        c = mine.shape[3]
        mean, deviation = _scale(cut[1])
        scaled = [((each.reshape(-1, c) - mean) / deviation).astype(np.float32).reshape(len(each), -1) for each in cut]
        sizes.append(max(mine.shape[1:3]))
        distances.append(SCALE * _along(scaled[0], scaled[1], directions, seed, number))
    return Distance(n, tuple(sizes), tuple(distances))


def distance_bound(
    images: NDArray[np.uint8], error: float, *, patches: int = PATCHES, seed: int = 0
) -> tuple[float, ...]:
    """How far images may be, level by level, from others that are these with errors: a wide bound.

    Patches at the same places are one way of pairing those of both sets, and along a direction none is nearer than the
    sorted one. A difference v of d = 49·C numbers has a mean length along all directions of at most |v|·√(2/(π(d − ½))). A
    level of the pyramid is the difference of two averages, so the RMS of its errors is at most twice that of the pixels.
    Pixels in the middle are in more patches than the average one: along a side up to side/max(side − 6, 7) times as many.

    Args:
        images: uint8 [n, H, W, C], which the others are compared with.
        error: the RMS of the errors of the others' pixels, in levels.
        patches, seed: as for :func:`sliced_wasserstein`.
    """
    found = []
    pyramid = list(levels(images))
    for number, level in enumerate(pyramid):
        _, deviation = _scale(_patches(level, patches, seed, number))
        sides = np.array(level.shape[1:3], np.float64)
        density = float(np.prod(sides / np.maximum(sides - SIDE + 1, SIDE)))
        at_level = error * (2 if number < len(pyramid) - 1 else 1) * np.sqrt(density)
        d = SIDE * SIDE * level.shape[3]
        found.append(float(SCALE * np.sqrt(2 / np.pi * d / (d - 0.5)) * at_level / deviation.min()))
    return tuple(found)


def _scale(patches: Float32) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(mean, deviation) of each channel of patches, float64 [C] each."""
    flat = patches.reshape(-1, patches.shape[-1])
    mean: NDArray[np.float64] = flat.mean(axis=0, dtype=np.float64)
    deviation: NDArray[np.float64] = np.maximum(flat.std(axis=0, dtype=np.float64), 1e-6)
    return mean, deviation


def levels(images: NDArray[np.uint8]) -> Iterator[Float32]:
    """The Laplacian pyramid: what each size has beside the next smaller one, and the smallest itself.

    Yields:
        float32 [n, H, W, C], finest first, down to sides of :data:`COARSEST`.
    """
    now = images.astype(np.float32)
    while min(now.shape[1:3]) >= 2 * COARSEST:
        below = _blurred(now)[:, ::2, ::2]
        yield now - _enlarged(below, now.shape)
        now = below
    yield now


def _blurred(images: Float32) -> Float32:
    """Each side filtered by (1, 4, 6, 4, 1)/16, mirrored at the edges (Burt & Adelson 1983)."""
    for axis in (1, 2):
        pad = [(2, 2) if i == axis else (0, 0) for i in range(4)]
        wide = np.pad(images, pad, mode="reflect")
        length = images.shape[axis]
        parts = [np.take(wide, range(i, i + length), axis=axis) for i in range(5)]
        images = ((parts[0] + parts[4] + 4 * (parts[1] + parts[3]) + 6 * parts[2]) / 16).astype(np.float32)
    return images


def _enlarged(images: Float32, shape: tuple[int, ...]) -> Float32:
    """Twice as large, the pixels between filled in by the same filter."""
    wide = np.zeros(shape, np.float32)
    wide[:, ::2, ::2] = images
    return 4 * _blurred(wide)


def _spread(images: NDArray[np.uint8], n: int) -> NDArray[np.uint8]:
    if len(images) == n:
        return images
    chosen: NDArray[np.uint8] = images[np.linspace(0, len(images) - 1, n).round().astype(int)]
    return chosen


def _patches(level: Float32, count: int, seed: int, number: int) -> Float32:
    """Patches at random places, float32 [n·count, 7, 7, C]. The places depend on the image's index alone."""
    n, height, width, _ = level.shape
    below = np.repeat([height - SIDE + 1, width - SIDE + 1], count)
    at = noise.integers(seed, np.arange(n), Purpose.PATCH, below, repeat=2 * number)
    tops, lefts = (part.reshape(n, count, 1, 1) for part in (at[:, :count], at[:, count:]))
    rows, columns = tops + np.arange(SIDE).reshape(1, 1, -1, 1), lefts + np.arange(SIDE).reshape(1, 1, 1, -1)
    found: Float32 = level[np.arange(n).reshape(-1, 1, 1, 1), rows, columns]
    return found.reshape(n * count, SIDE, SIDE, -1)


def _along(mine: Float32, theirs: Float32, directions: int, seed: int, number: int) -> float:
    """The mean over unit directions of the mean distance between the sorted projections."""
    size = mine.shape[1]
    total = 0.0
    for begin in range(0, directions, _AT_ONCE):
        drawn = np.arange(begin, min(begin + _AT_ONCE, directions))
        axes = noise.normal(seed, drawn, 0, Purpose.PATCH, size, repeat=2 * number + 1).T
        axes = axes / np.linalg.norm(axes, axis=0)
        projected = [np.sort(each @ axes, axis=0) for each in (mine, theirs)]
        total += float(np.abs(projected[0] - projected[1]).mean(axis=0, dtype=np.float64).sum())
    return total / directions
