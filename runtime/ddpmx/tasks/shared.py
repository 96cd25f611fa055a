"""Images that share a latent (Ho et al. 2020, Figure 7): one chain down to some t, and several from there on."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddpmx.arrays.protocols import AnyArray
from ddpmx.errors import InputError
from ddpmx.pipeline import Pipeline
from ddpmx.sampling.request import Sampling
from ddpmx.tasks.steps import draws, visited


class Shared(NamedTuple):
    """Where the chains of several images part: the arguments of :meth:`ddpmx.Pipeline.generate`.

    Attributes:
        x: float32 [n, C, H, W], n times the same x_t.
        sampling: with ``start`` = t.
    """

    x: NDArray[np.float32]
    sampling: Sampling


def share_from(
    pipeline: Pipeline,
    n: int,
    t: int,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    source: int = 0,
    batch: int | None = None,
    label: int | str | None = None,
    cond: AnyArray | None = None,
    guidance: float = 1.0,
) -> Shared:
    """x_t of one image, from which several are then drawn, each with its own noise: what they share was there at t.

    Image ``source`` is the one that it is without this, but where the network conditions on itself, since x̂_0 is 0 where a
    chain begins.

    Args:
        pipeline: the model.
        n: how many are to be drawn.
        t: 0…T−1: the last timestep at which they are one, or the nearest that the chain visits.
        sampling: how the chain is run.
        seed: of the noise.
        source: the index of the image whose x_t it is.
        batch: with which the images are to be drawn.
        label, guidance: the class of all images, and w, as for :meth:`ddpmx.Pipeline.generate`.
        cond: float32 [1, K, H, W], the condition of all.

    Raises:
        InputError: a number out of its range, or a sampler that draws no noise, with which all images would be one.
        As :meth:`ddpmx.Pipeline.stream`.
    """
    sampling = Sampling() if sampling is None else sampling
    T = pipeline.spec.timesteps
    if isinstance(t, bool) or not isinstance(t, (int, np.integer)) or not 0 <= t < T:
        raise InputError(f"t must be from 0 to {T - 1}, not {t!r}", note=f"the model has T = {T}")
    table = pipeline.table(sampling)
    if not any(draws(table, number) for number in range(len(table))):
        raise InputError(
            f"the sampler {sampling.sampler} draws no noise, so images that share x_t are one image",
            hint="sampler ancestral, or ddim with η above 0",
        )
    t = visited(table, int(t))
    steps = pipeline.stream(
        1, seed=seed, first=source, batch=batch, labels=label, cond=cond, guidance=guidance, sampling=sampling
    )
    x = next(step.x for step in steps if step.t == t)
    return Shared(np.repeat(x, n, axis=0), replace(sampling, start=t))
