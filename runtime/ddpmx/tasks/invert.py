"""DDIM inversion (Song et al. 2020, §5.4): the x_T from which the ddim chain draws an image."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ddpmx.arrays.protocols import Labels
from ddpmx.diffusion.grids import Spacing
from ddpmx.diffusion.schedule import respace
from ddpmx.errors import Cancelled, InputError
from ddpmx.pipeline import Pipeline
from ddpmx.tasks.continuous import Float32
from ddpmx.tasks.steps import as_states

MOST_ITERATIONS = 100


def invert(
    pipeline: Pipeline,
    images: NDArray[np.uint8],
    *,
    steps: int | None = None,
    spacing: Spacing = "linspace",
    iterations: int = 3,
    first: int = 0,
    batch: int | None = None,
    labels: Labels | None = None,
    cond: NDArray[np.float32] | None = None,
    guidance: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Float32:
    """Follow the ddim chain backwards, from images to x_T.

    A step of the chain from t to s, x_s = √(ᾱ_s/ᾱ_t)·(x_t − √(1−ᾱ_t)·ε̂(x_t, t)) + √(1−ᾱ_s)·ε̂(x_t, t), is solved for
    x_t, which its ε̂ depends on: by ``iterations`` of putting in the last x_t, beginning with x_s. One iteration is what is
    usually called DDIM inversion; each further one comes nearer to what ``pipeline.generate(x=…, sampler="ddim")`` with the
    same steps and spacing makes the image of, as long as x̂_0 is not clipped on the way.

    Args:
        pipeline: the model.
        images: uint8 [n, H, W, C].
        steps, spacing: of the chain; all T timesteps by default.
        iterations: calls of the network in each step.
        first, batch, labels, cond, guidance: as for :meth:`ddpmx.Pipeline.evaluate`.
        progress: called with (network calls done, network calls in all).
        cancel: called before each call of the network; True stops the work.

    Returns:
        x_T, float32 [n, C, H, W].

    Raises:
        InputError: images that do not fit the model, a number out of its range, a schedule that ends at ᾱ = 0, or a network
            that conditions on itself.
        Cancelled: ``cancel`` returned True.
        NumericError: the network's output was not finite.
        BackendError: the network could not be run.
    """
    spec = pipeline.spec
    x = as_states(pipeline, images)
    if type(iterations) is not int or not 1 <= iterations <= MOST_ITERATIONS:
        raise InputError(f"iterations must be a whole number from 1 to {MOST_ITERATIONS}, not {iterations!r}")
    if spec.self_condition:
        raise InputError("a chain whose network takes x̂_0 of the step before cannot be followed backwards")
    grid = pipeline.table(sampler="ddim", steps=steps, spacing=spacing).timesteps[::-1]
    part = respace(spec.make_schedule(), grid)
    if part.alpha_bar[-1] <= 0:
        raise InputError("this schedule ends at ᾱ = 0, where nothing of the image is left in x_T")
    calls = len(grid) * iterations
    for i, t in enumerate(grid.tolist()):
        ratio = math.sqrt(part.alpha_bar[i] / part.alpha_bar_prev[i])
        # x_t = √(ᾱ_t/ᾱ_s)·x_s + (√(1−ᾱ_t) − √(ᾱ_t/ᾱ_s)·√(1−ᾱ_s))·ε̂(x_t, t)
        of_eps = math.sqrt(part.one_minus_alpha_bar[i]) - ratio * math.sqrt(part.one_minus_alpha_bar_prev[i])
        below, guess = np.float32(ratio) * x, x
        for repeat in range(iterations):
            if cancel is not None and cancel():
                raise Cancelled("cancelled before the chain finished")
            eps = pipeline.evaluate(guess, t, first=first, batch=batch, labels=labels, cond=cond, guidance=guidance).eps
            guess = below + np.float32(of_eps) * eps
            if progress is not None:
                progress(i * iterations + repeat + 1, calls)
        x = guess
    return x
