"""Interpolation between two images (Ho et al. 2020, Figures 8 and 9): mixed at x_t, and denoised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddpmx.arrays.protocols import AnyArray, Labels
from ddpmx.diffusion.noise import Purpose, check_seed, normal
from ddpmx.errors import InputError
from ddpmx.pipeline import Pipeline
from ddpmx.sampling.conditioning import class_labels
from ddpmx.sampling.pixels import to_nhwc
from ddpmx.sampling.request import Sampling
from ddpmx.tasks.steps import as_states, draws, q_sample, step, visited

Float32 = NDArray[np.float32]

LAMBDAS = 9
"""Points between two images, their ends included."""


class Interpolated(NamedTuple):
    """Images between two.

    Attributes:
        pixels: uint8 [n, H, W, C], one for each λ.
        x0: float32 [n, C, H, W], the same before it was rounded, about −1…1.
        t: the timestep at which they were mixed, or −1.
    """

    pixels: NDArray[np.uint8]
    x0: Float32
    t: int


def interpolate(
    pipeline: Pipeline,
    a: NDArray[np.uint8],
    b: NDArray[np.uint8],
    t: int | None = None,
    lambdas: int | Sequence[float] | NDArray[Any] = LAMBDAS,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    index: int = 0,
    batch: int | None = None,
    labels: Labels | None = None,
    cond: AnyArray | None = None,
    guidance: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Interpolated:
    """Draw images between two: x̄_t = (1−λ)·x_t + λ·x'_t with x_t and x'_t the two, noised to t by one and the same ε, and
    then the chain from x̄_t down, with one and the same noise for every λ.

    The larger t, the more of what is between them is drawn, and the less it resembles either. With t = −1 nothing is
    noised: the images themselves are mixed, and λ = 0 and 1 give them back.

    Args:
        pipeline: the model.
        a: uint8 [H, W, C], of the model's size: λ = 0.
        b: the same: λ = 1.
        t: −1…T−1, or the nearest that the chain visits; by default in the middle, T // 2, as in Figure 8.
        lambdas: each λ, any number (beyond 0 and 1 the line goes on); or how many from 0 to 1, at least 2.
        sampling: how the chain is run.
        seed: of the noise.
        index: which image's noise it is.
        batch: how many λ run at once, at most.
        labels, cond, guidance: as for :meth:`ddpmx.Pipeline.generate`, labels and cond one for all
            or one for each λ.
        progress: called repeatedly with (steps done, steps in all).
        cancel: called repeatedly; True stops the work.

    Raises:
        InputError: images that do not fit the model, or a number out of its range.
        Cancelled, NumericError, BackendError: as :meth:`ddpmx.Pipeline.evaluate`.
    """
    spec = pipeline.spec
    sampling = Sampling() if sampling is None else sampling
    if sampling.start is not None:
        raise InputError("start and t exclude each other: both say where the chain begins")
    ends = [as_states(pipeline, np.asarray(image)[None], what) for what, image in (("a", a), ("b", b))]
    weights = _weights(lambdas)
    n = len(weights)
    T = spec.timesteps
    t = T // 2 if t is None else t
    if isinstance(t, bool) or not isinstance(t, (int, np.integer)) or not -1 <= t < T:
        raise InputError(f"t must be from -1 to {T - 1}, not {t!r}", note="-1 is the images themselves")
    batch = pipeline.check_request(
        n, seed=seed, first=index, batch=batch, labels=labels, guidance=guidance, sampling=sampling
    )
    mixing = weights.astype(np.float32)[:, None, None, None]
    if t == -1:
        mixed = (1 - mixing) * ends[0] + mixing * ends[1]
        return Interpolated(to_nhwc(mixed), mixed, -1)
    t = visited(pipeline.table(sampling), int(t))
    table = pipeline.table(replace(sampling, start=t))
    size, seed = ends[0].size, check_seed(seed)

    def z_of(at: int, purpose: Purpose) -> Float32:
        return normal(seed, np.array([index]), at, purpose, size).reshape(1, *spec.shape)

    x_a, x_b = (q_sample(spec.make_schedule(), x0, t, z_of(t, Purpose.DIFFUSE)) for x0 in ends)
    x = (1 - mixing) * x_a + mixing * x_b
    earlier: list[Float32] = []  # x̂_0 of the step before, and of the one before that
    classes = None if labels is None else class_labels(spec, n, labels)
    conditions = None if cond is None else np.asarray(cond)
    if conditions is not None and len(conditions) == 1:
        conditions = np.repeat(conditions, n, axis=0)
    for number, at in enumerate(table.timesteps.tolist()):
        more: dict[str, Any] = {"x0_prev": earlier[0]} if spec.self_condition and earlier else {}
        said = pipeline.evaluate(
            x, at, batch=batch, labels=classes, cond=conditions, guidance=guidance, cancel=cancel, **more
        )
        z = np.broadcast_to(z_of(at, Purpose.STEP), x.shape) if draws(table, number) else None
        x = step(table, number, x, said.x0, said.var, z, earlier)
        earlier = [said.x0, *earlier[:1]]
        if progress is not None:
            progress(number + 1, len(table))
    x0 = earlier[0]
    return Interpolated(to_nhwc(x0), x0, t)


def _weights(lambdas: Any) -> NDArray[np.float64]:
    """Each λ, float64 [n]."""
    if isinstance(lambdas, (int, np.integer)) and not isinstance(lambdas, bool):
        if not 2 <= lambdas <= 1 << 16:
            raise InputError(f"lambdas must be 2 or more points, or their λ, not {lambdas}")
        return np.linspace(0, 1, int(lambdas))
    try:
        weights = np.asarray(lambdas, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError("lambdas must be how many, or numbers", note=str(error)[:200]) from error
    if weights.ndim != 1 or not weights.size or not np.isfinite(weights).all():
        raise InputError("lambdas must be how many, or numbers", note=f"they are {weights.dtype} {[*weights.shape]}")
    return weights
