"""The score view of a DDPM (Song et al. 2021): ε̂ is the score, and the reverse SDE draws images by it.

    ∇ log q(x_t) ≈ −ε̂(x_t, t)/√(1−ᾱ_t)

The chain of :meth:`ddpmx.Pipeline.generate` integrates the same SDE by a rule of its own; what is here follows the later
paper: Euler–Maruyama as predictor, annealed Langevin steps as corrector. The ODE with the same marginals is in
:mod:`ddpmx.tasks.flow`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.arrays.protocols import Labels
from ddpmx.diffusion import noise
from ddpmx.diffusion.grids import Spacing
from ddpmx.diffusion.noise import Purpose, check_seed
from ddpmx.errors import InputError
from ddpmx.pipeline import Pipeline
from ddpmx.sampling import chain
from ddpmx.sampling.pixels import to_nhwc
from ddpmx.tasks.continuous import Between, Float32, alpha_bar

LARGEST = 0.25
"""∫β of one step of the SDE: Euler's error of a step is of this order. Longer ones are cut. T = 1000 of the linear schedule
has 0.02 at most, and the last step of the cosine one 6.9."""

MOST_CORRECTIONS = 1000


def score(pipeline: Pipeline, x: Float32, t: int | NDArray[np.integer[Any]], **conditioning: Any) -> Float32:
    """∇ log q(x_t), float32 [n, C, H, W], by the network's output as it is, without the clip.

    Args:
        pipeline: the model.
        x: x_t, float32 [n, C, H, W].
        t: 0…T−1, one for all images, or one for each.
        **conditioning: as for :meth:`ddpmx.Pipeline.evaluate`.

    Raises:
        InputError, NumericError, BackendError: as :meth:`ddpmx.Pipeline.evaluate`.
    """
    deviation = np.sqrt(pipeline.spec.make_schedule().one_minus_alpha_bar)[np.asarray(t)].astype(np.float32)
    found: Float32 = -pipeline.evaluate(x, t, **conditioning).eps / deviation.reshape(-1, 1, 1, 1)
    return found


def sde(
    pipeline: Pipeline,
    n: int = 1,
    *,
    steps: int | None = None,
    spacing: Spacing = "linspace",
    corrections: int = 0,
    ratio: float = 0.16,
    seed: int = 0,
    first: int = 0,
    batch: int | None = None,
    labels: Labels | None = None,
    cond: NDArray[np.float32] | None = None,
    guidance: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> NDArray[np.uint8]:
    """Draw images by the reverse SDE, dx = −β·(½x + ∇ log q)·dt + √β·dw: Euler–Maruyama from t = T−1 to 0, then x̂_0.

    With ``corrections``, that many Langevin steps follow each step, on the level that it leads to (Song et al., Algorithm
    5): x += e·∇ log q + √(2e)·z, with e = 2α·(ratio·‖z‖/‖∇ log q‖)², the norms of each image for itself.

    An image depends on the seed and its index alone, not on what else is drawn.

    Args:
        pipeline: the model.
        n: how many.
        steps: how many of the T timesteps are visited; all by default. Where ∫β between two of them is more than
            :data:`LARGEST`, there are further steps between them, with the network's answers interpolated.
        spacing: which timesteps, see :func:`ddpmx.diffusion.samplers.timestep_grid`.
        corrections: Langevin steps after each step.
        ratio: of signal to noise in them, above 0; the paper's for this SDE is 0.16.
        seed, first, batch, labels, cond, guidance: as for :meth:`ddpmx.Pipeline.generate`.
        progress: called with (steps done, steps in all).
        cancel: called before each call of the network; True stops the work.

    Returns:
        uint8 [n, H, W, C].

    Raises:
        InputError: a number out of its range, a schedule that ends at ᾱ = 0, or a network that conditions on itself.
        Cancelled: ``cancel`` returned True.
        NumericError: the network's output was not finite.
        BackendError: the network could not be run.
    """
    if type(corrections) is not int or not 0 <= corrections <= MOST_CORRECTIONS:
        raise InputError(f"corrections must be a whole number from 0 to {MOST_CORRECTIONS}, not {corrections!r}")
    if not (math.isfinite(ratio) and ratio > 0):
        raise InputError(f"ratio must be a number above 0, not {ratio!r}", hint="0.16 is the paper's")
    spec, seed = pipeline.spec, check_seed(seed)
    pipeline.check_request(n, first=first, batch=batch, labels=labels, guidance=guidance)
    network = Between(pipeline, cancel, batch=batch, labels=labels, cond=cond, guidance=guidance)
    size = math.prod(spec.shape)
    grid = pipeline.table(sampler="ddim", steps=steps, spacing=spacing).timesteps
    parts = [_parts(network, int(t), int(following)) for t, following in itertools.pairwise(grid)]
    total, done = sum(map(len, parts)) + 1, 0
    images = np.arange(first, first + n)

    def drawn(t: int, purpose: Purpose, repeat: int) -> Float32:
        return noise.normal(seed, images, t, purpose, size, repeat=repeat).reshape(n, *spec.shape)

    x = chain.initial(seed, images, spec.shape)
    if grid[-1] != 0:
        raise InputError(f"the spacing {spacing!r} ends at t = {grid[-1]}, not at 0", hint="linspace or leading")
    for t, part in zip(grid[:-1].tolist(), parts, strict=True):
        for number, (level, following) in enumerate(part):
            beta = math.log(alpha_bar(following)) - math.log(alpha_bar(level))
            x = x + np.float32(beta) * (np.float32(0.5) * x + _score(network, x, level, first))
            x += np.float32(math.sqrt(beta)) * drawn(t, Purpose.STEP, number)
            for repeat in range(corrections):
                z = drawn(t, Purpose.LANGEVIN, number * corrections + repeat)
                x = _corrected(x, _score(network, x, following, first), z, ratio, math.exp(-beta))
            done += 1
            if progress is not None:
                progress(done, total)
    sample = network.x0(x, first)
    if progress is not None:
        progress(total, total)
    return to_nhwc(sample)


def _parts(network: Between, t: int, following: int) -> list[tuple[float, float]]:
    """The steps from a timestep to the next lower one, as pairs of levels: several where ∫β is large."""
    begin, end = (math.log(alpha_bar(network.levels[i])) for i in (t, following))
    count = max(1, math.ceil((end - begin) / LARGEST))
    inner = [_level(begin + (end - begin) * i / count) for i in range(1, count)]
    edges = [float(network.levels[t]), *inner, float(network.levels[following])]
    return list(itertools.pairwise(edges))


def _level(log_alpha_bar: float) -> float:
    """ℓ of log ᾱ: ½·log((1−ᾱ)/ᾱ)."""
    return 0.5 * (math.log(-math.expm1(log_alpha_bar)) - log_alpha_bar)


def _score(network: Between, x: Float32, level: float, first: int) -> Float32:
    found: Float32 = network.eps(x, level, first) / np.float32(-math.sqrt(1 - alpha_bar(level)))
    return found


def _corrected(x: Float32, gradient: Float32, z: Float32, ratio: float, alpha: float) -> Float32:
    """x after one Langevin step with the noise z, whose size is such that signal and noise have the given ratio."""
    axes = (1, 2, 3)
    norms = [np.sqrt(np.square(a, dtype=np.float64).sum(axis=axes, keepdims=True)) for a in (z, gradient)]
    e = 2 * alpha * np.square(ratio * norms[0] / np.maximum(norms[1], 1e-12))
    moved: Float32 = x + e.astype(np.float32) * gradient + np.sqrt(2 * e).astype(np.float32) * z
    return moved
