"""Variations of images (SDEdit, Meng et al. 2022; "img2img"): noise is added up to some t, and taken away by the chain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddpmx.arrays.protocols import AnyArray, Labels
from ddpmx.diffusion.noise import Purpose, normal
from ddpmx.errors import InputError
from ddpmx.pipeline import Pipeline
from ddpmx.sampling.request import Sampling
from ddpmx.tasks.steps import Model, as_states, q_sample, visited

STRENGTH = 0.5


class Begun(NamedTuple):
    """Where a chain begins that varies images: the arguments of :meth:`ddpmx.Pipeline.generate`.

    Attributes:
        x: float32 [n, C, H, W], x_t.
        sampling: with ``start`` = t.
    """

    x: NDArray[np.float32]
    sampling: Sampling


def begin(
    pipeline: Model,
    images: NDArray[np.uint8],
    strength: float = STRENGTH,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    first: int = 0,
) -> Begun:
    """Noise images to the t at which a chain begins that varies them.

    Image i has the noise of its index, ε of ``Purpose.DIFFUSE``, which no step of the chain shares.

    Args:
        pipeline: the model; a :class:`ddpmx.serve.batcher.Batcher` is one as well.
        images: uint8 [n, H, W, C], of the model's size.
        strength: how much of the chain is run, above 0 up to 1: t is the visited timestep nearest to strength·T − 1. Near
            0 the image stays; at 1 hardly anything of it is left.
        sampling: how the chain is run.
        seed, first: as for :meth:`ddpmx.Pipeline.generate`, to which the same have to be passed.

    Raises:
        InputError: images that do not fit the model, or a number out of its range.
    """
    sampling = Sampling() if sampling is None else sampling
    if sampling.start is not None:
        raise InputError("start and strength exclude each other: both say where the chain begins")
    if isinstance(strength, bool) or not isinstance(strength, (int, float, np.floating)) or not 0 < strength <= 1:
        raise InputError(f"strength must be above 0 and at most 1, not {strength!r}")
    x0, T = as_states(pipeline, images), pipeline.spec.timesteps
    t = visited(pipeline.table(sampling), round(strength * T) - 1)
    eps = normal(seed, np.arange(first, first + len(x0)), t, Purpose.DIFFUSE, x0[0].size).reshape(x0.shape)
    return Begun(q_sample(pipeline.spec.make_schedule(), x0, t, eps), replace(sampling, start=t))


def variations(
    pipeline: Pipeline,
    images: NDArray[np.uint8],
    strength: float = STRENGTH,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    first: int = 0,
    batch: int | None = None,
    labels: Labels | None = None,
    cond: AnyArray | None = None,
    guidance: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> NDArray[np.uint8]:
    """Draw a variation of each image, uint8 [n, H, W, C]: :func:`begin`, and the rest of the chain.

    Args:
        pipeline, images, strength, sampling, seed, first: as for :func:`begin`.
        batch, labels, cond, guidance, progress, cancel: as for :meth:`ddpmx.Pipeline.generate`.

    Raises:
        As :meth:`ddpmx.Pipeline.generate`.
    """
    begun = begin(pipeline, images, strength, sampling=sampling, seed=seed, first=first)
    return pipeline.generate(
        len(begun.x),
        x=begun.x,
        sampling=begun.sampling,
        seed=seed,
        first=first,
        batch=batch,
        labels=labels,
        cond=cond,
        guidance=guidance,
        progress=progress,
        cancel=cancel,
    )
