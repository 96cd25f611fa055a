"""Noise taken out of images: the model's own estimate of what was below it, or a draw from what may have been.

An image y = x_0 + s·ε with s in units where images are −1…1 is a state of the chain but for its scale: √ᾱ_t·y is x_t at the
t where s = σ_t = √((1−ᾱ_t)/ᾱ_t) (Ho et al. 2020, equation 4). There the network knows x̂_0 = E[x_0 | x_t], the estimate with
the least square error, in one call (equation 15); and the chain from there on draws from p(x_0 | x_t).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddpmx.arrays.protocols import Labels
from ddpmx.diffusion.noise import Purpose, check_seed, normal
from ddpmx.diffusion.schedule import Schedule
from ddpmx.errors import InputError
from ddpmx.pipeline import Pipeline
from ddpmx.sampling.chain import Preview
from ddpmx.sampling.conditioning import class_labels
from ddpmx.sampling.pixels import to_nhwc
from ddpmx.tasks.steps import draws, step
from ddpmx.tasks.tiles import TiledNetwork, Tiling

Float32 = NDArray[np.float32]

LEVELS = 127.5
"""Pixels of 0…255 by 1 of the model's −1…1."""

_MAD_TO_SIGMA = 0.6744897501960817
"""The median of |z| for z ~ N(0, 1)."""

_FEWEST = 16
"""Details from which the noise is measured."""


class Denoised(NamedTuple):
    """Images without their noise.

    Attributes:
        pixels: uint8 [n, H, W, C].
        x0: float32 [n, C, H, W], the same before it was rounded, about −1…1.
        sigma: float64 [n], the standard deviation of the noise, on the scale of 0…255; measured, where it was not passed.
        t: int64 [n], the timestep at which each image was taken for x_t.
    """

    pixels: NDArray[np.uint8]
    x0: Float32
    sigma: NDArray[np.float64]
    t: NDArray[np.int64]


def noise_scale(schedule: Schedule) -> NDArray[np.float64]:
    """σ_t = √((1−ᾱ_t)/ᾱ_t), float64 [T]: the noise in x_t/√ᾱ_t, where images are −1…1. It rises with t."""
    with np.errstate(divide="ignore"):  # a schedule may end at ᾱ = 0
        scale: NDArray[np.float64] = np.sqrt(schedule.one_minus_alpha_bar / schedule.alpha_bar)
    return scale


def timestep_of(schedule: Schedule, sigma: float) -> int:
    """The t whose σ_t is nearest to ``sigma``, on the scale of 0…255, by their ratio; 0 for less noise than any t has.

    Raises:
        InputError: not a number of at least 0, or more noise than at the last t.
    """
    scale = LEVELS * noise_scale(schedule)
    value = _checked(sigma)
    if value > scale[-1]:
        raise InputError(
            f"the model knows no image with so much noise: σ = {value:g} on the scale of 0…255",
            note=f"at its last timestep σ is {scale[-1]:g}",
        )
    if value <= scale[0]:
        return 0
    finite = scale[np.isfinite(scale)]
    return int(np.abs(np.log(finite / value)).argmin())


def estimate_sigma(image: NDArray[Any]) -> float:
    """The standard deviation of the noise in an image, from the image alone.

    The diagonal details of a Haar transform, (y_ij − y_i+1,j − y_i,j+1 + y_i+1,j+1)/2, hold the noise with its own standard
    deviation and little of a smooth image; the median of their size, divided by 0.6745, does not feel the edges, which are
    few (Donoho & Johnstone 1994, "Ideal spatial adaptation by wavelet shrinkage"). All shifts are taken, not every second.

    In 8 bits noise ends at 0 and 255, so details with such a pixel are left out, if others remain. What is as fine as a
    pixel counts as noise: textures, and images of a few pixels. From few details the estimate is a rough one: in 256 images
    of 16×16 it scatters by a fifth.

    Args:
        image: uint8 or float [H, W, C], on the scale of 0…255; H and W at least 2. Channels have the same noise.

    Returns:
        σ ≥ 0, on the scale of 0…255.

    Raises:
        InputError: another shape, or numbers that are not finite.
    """
    y = np.asarray(image)
    if y.ndim != 3 or y.dtype.kind not in "uf" or min(y.shape[:2]) < 2 or not y.shape[2]:
        raise InputError(
            "noise is measured in an image [H, W, C] of 2×2 pixels or more", note=f"it is {y.dtype} {[*y.shape]}"
        )
    if not np.isfinite(y).all():
        raise InputError("the image holds NaN or infinities")
    corners = [y[:-1, :-1], y[1:, 1:], y[1:, :-1], y[:-1, 1:]]
    a, d, b, c = (corner.astype(np.float64) for corner in corners)
    details = np.abs(a - b - c + d) / 2
    if y.dtype == np.uint8:
        inside = np.all([(corner > 0) & (corner < 255) for corner in corners], axis=0)
        if inside.sum() >= _FEWEST:
            details = details[inside]
    return float(np.median(details) / _MAD_TO_SIGMA)


def denoise(
    pipeline: Pipeline,
    images: NDArray[Any],
    sigma: float | Sequence[float] | NDArray[Any] | None = None,
    *,
    sample: bool = False,
    seed: int = 0,
    first: int = 0,
    overlap: int | None = None,
    batch: int | None = None,
    labels: Labels | None = None,
    guidance: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Denoised:
    """Take Gaussian noise out of images, by what the model knows of images without it.

    The estimate is x̂_0 = E[x_0 | x_t] at the t of :func:`timestep_of`, the nearest of T. Where there is less noise than at
    any t, the gradient in E[x_0 | y] = y + s²·∇log p_s(y) (Miyasawa 1961; Efron 2011, "Tweedie's formula") is that of
    t = 0: y + (s/σ_0)²·(x̂_0 − y). So σ = 0 gives the images back.

    With ``sample`` the chain, with its noise, runs from x_t down instead: an image that may have been below the noise, with
    all of its detail, and a larger square error.

    Images larger than the network's are cut into overlapping tiles, see :class:`ddpmx.tasks.tiles.Tiling`; in a chain x̂_0
    is blended in every step. An image's result depends on nothing but the image, σ, seed and index.

    Args:
        pipeline: the model, one that takes no condition image.
        images: uint8 [n, H, W, C] of any H and W; or float, on the scale of 0…255, and not cut off at its ends.
        sigma: the standard deviation of the noise on that scale, one for all images or one for each; None to measure it in
            each, by :func:`estimate_sigma`.
        sample: see above.
        seed: of the chain's noise.
        first: the index of the first image.
        overlap: of the tiles, in pixels; by default a quarter of their shorter side.
        batch, labels, guidance: as for :meth:`ddpmx.Pipeline.evaluate`, labels one for all images or one for each.
        progress: called repeatedly with (network calls done, network calls in all), counted in tiles.
        cancel: called repeatedly; True stops the work.

    Raises:
        InputError: an array that does not fit the model, or a number out of its range.
        Cancelled, NumericError, BackendError: as :meth:`ddpmx.Pipeline.evaluate`.
    """
    spec = pipeline.spec
    C, H, W = spec.shape
    y = np.asarray(images)
    if y.ndim != 4 or y.shape[3] != C or 0 in y.shape or not (y.dtype == np.uint8 or y.dtype.kind == "f"):
        raise InputError(
            f"images must be uint8 or float [n, H, W, {C}]",
            note=f"they are {y.dtype} {[*y.shape]}",
            hint="the scale is 0…255",
        )
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise InputError("images holds NaN or infinities")
    if spec.condition is not None:
        raise InputError("a model that takes a condition image is no denoiser of other images")
    n = len(y)
    schedule = spec.make_schedule()
    measured = np.array([estimate_sigma(image) for image in y]) if sigma is None else _one_each(sigma, n)
    times = np.array([timestep_of(schedule, float(value)) for value in measured])
    batch = pipeline.check_request(n, seed=seed, first=first, batch=batch, labels=labels, guidance=guidance)
    tiling = Tiling((y.shape[1], y.shape[2]), (H, W), min(H, W) // 4 if overlap is None else overlap)
    noisy = y.astype(np.float64).transpose(0, 3, 1, 2) / LEVELS - 1
    x = (np.sqrt(schedule.alpha_bar[times])[:, None, None, None] * noisy).astype(np.float32)
    x = np.ascontiguousarray(np.stack([tiling.widened(each) for each in x]))
    classes: list[Any] = [None] * n if labels is None else class_labels(spec, n, labels).tolist()
    count = _counter(progress, int((times + 1).sum() if sample else n) * len(tiling))
    how: dict[str, Any] = {"batch": batch, "guidance": guidance, "cancel": cancel}
    if len(tiling) == 1 and not sample:
        said = pipeline.evaluate(x, times, first=first, labels=labels, progress=progress, **how).x0
    elif len(tiling) == 1:
        said = np.empty_like(x)
        for same in _runs(times):
            of = None if labels is None else classes[same]
            said[same] = _chains(pipeline, x[same], int(times[same.start]), seed, first + same.start, of, count, how)
    else:
        network, said = TiledNetwork(pipeline, tiling, batch, guidance, count, cancel), np.empty_like(x)
        for i, (t, label) in enumerate(zip(times.tolist(), classes, strict=True)):
            if sample:
                said[i] = _chain_on_tiles(network, x[i], t, label, check_seed(seed), first + i)
            else:
                said[i] = network.evaluate(x[i], t, label)[0]
    x0 = np.stack([tiling.cropped(each) for each in said])
    if not sample:
        share = np.minimum(measured / LEVELS / noise_scale(schedule)[0], 1)[:, None, None, None] ** 2
        x0 = (noisy + share * (x0 - noisy)).astype(np.float32)
    return Denoised(to_nhwc(x0), x0, measured, times)


def _runs(times: NDArray[np.int64]) -> list[slice]:
    """The stretches of images with the same t: their indices follow each other, as those of a chain's images do."""
    ends = [0, *(np.flatnonzero(np.diff(times)) + 1).tolist(), len(times)]
    return [slice(begin, end) for begin, end in itertools.pairwise(ends)]


def _chains(
    pipeline: Pipeline,
    x: Float32,
    t: int,
    seed: int,
    first: int,
    labels: list[int] | None,
    count: Callable[[int], None] | None,
    how: dict[str, Any],
) -> Float32:
    """The chains of images of the network's size from x_t down, float32 [n, C, H, W]."""
    ends = np.empty_like(x)

    def keep(at: int, step: Preview) -> None:
        ends[at : at + len(step.x0)] = step.x0  # the last one stays
        if count is not None:
            count(len(step.x0))

    pipeline.generate(len(x), x=x, start=t, seed=seed, first=first, labels=labels, preview=keep, **how)
    return ends


def _chain_on_tiles(network: TiledNetwork, x: Float32, t: int, label: int | None, seed: int, index: int) -> Float32:
    """The chain of one canvas from x_t down, float32 [C, H', W'], with x̂_0 blended in every step; of one tile the same
    bits as those of :meth:`ddpmx.Pipeline.generate`.
    """
    table = network.pipeline.table(start=t)
    previous: Float32 = np.zeros_like(x)
    for number, at in enumerate(table.timesteps.tolist()):
        x0, var = network.evaluate(x, at, label, previous)
        z = normal(seed, np.array([index]), at, Purpose.STEP, x.size).reshape(x.shape) if draws(table, number) else None
        x, previous = step(table, number, x, x0, var, z), x0
    return previous


def _counter(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None] | None:
    """Adds up the tiles of many calls."""
    if progress is None:
        return None
    report, done = progress, 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        report(done, total)

    return advance


def _one_each(sigma: Any, n: int) -> NDArray[np.float64]:
    """The noise of each image, float64 [n]."""
    try:
        array = np.asarray(sigma, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"sigma must be a number, or {n} of them, not {sigma!r}") from error
    if array.shape not in ((), (n,)):
        raise InputError(f"sigma must be a number, or {n} of them", note=f"it is {[*array.shape]}")
    return np.broadcast_to(array, n).copy()


def _checked(sigma: float) -> float:
    if not 0 <= sigma < np.inf:
        raise InputError(f"σ of the noise must be 0 or more, on the scale of 0…255, not {sigma!r}")
    return float(sigma)
