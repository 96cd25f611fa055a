"""The network at any noise level between its timesteps, for what is written in continuous time (Song et al. 2021).

A DDPM's forward process is the variance preserving SDE dx = −½β·x·dt + √β·dw, looked at in T places: between two of them
∫β dt = log ᾱ − log ᾱ'. A level is named by ℓ = log(√(1−ᾱ)/√ᾱ), which rises with t.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpmx.diffusion.grids import log_snr
from ddpmx.diffusion.schedule import Float64, Schedule
from ddpmx.errors import Cancelled, InputError
from ddpmx.pipeline import Pipeline

Float32 = NDArray[np.float32]

SAME = 1e-9
"""Levels that are nearer than this are one."""


def levels(schedule: Schedule) -> Float64:
    """ℓ_t = −λ_t of each timestep, float64 [T], rising.

    Raises:
        InputError: the schedule ends at ᾱ = 0, where ℓ is infinite.
    """
    if schedule.alpha_bar[-1] <= 0:
        raise InputError(
            "this schedule ends at ᾱ = 0, which no finite time of the SDE reaches",
            hint="the chain of `ddpmx generate` goes there",
        )
    return -log_snr(schedule)


def alpha_bar(level: float) -> float:
    """ᾱ at ℓ: 1/(1 + exp(2ℓ))."""
    return float(1 / (1 + np.exp(2 * level)))


class Between:
    """ε̂(x, ℓ) of a model: the network's at its timesteps, and linear in ℓ between the two that lie around.

    Args:
        pipeline: the model.
        cancel: called before each call of the network; True stops the work.
        **conditioning: ``batch``, ``labels``, ``cond`` and ``guidance`` of :meth:`ddpmx.Pipeline.evaluate`.

    Attributes:
        levels: ℓ_t, float64 [T].
        calls: how often the network ran, an image counted once each time.
    """

    def __init__(self, pipeline: Pipeline, cancel: Callable[[], bool] | None = None, **conditioning: Any) -> None:
        if pipeline.spec.self_condition:
            raise InputError(
                "the network takes x̂_0 of the step before, so that it is no function of x and t alone",
                hint="`ddpmx generate` runs its chain",
            )
        self.levels = levels(pipeline.spec.make_schedule())
        self.calls = 0
        self._pipeline, self._cancel, self._conditioning = pipeline, cancel, conditioning

    def neighbours(self, level: float) -> list[tuple[int, float]]:
        """The timesteps at or around a level, with their weights."""
        above = int(np.searchsorted(self.levels, level - SAME))
        above = min(max(above, 0), len(self.levels) - 1)
        if above == 0 or abs(self.levels[above] - level) <= SAME or level > self.levels[-1]:
            return [(above, 1.0)]
        low, high = self.levels[above - 1], self.levels[above]
        share = float((level - low) / (high - low))
        return [(above - 1, 1 - share), (above, share)]

    def eps(self, x: Float32, level: float, first: int = 0) -> Float32:
        """ε̂ of states at one level, float32 [n, C, H, W]; ``first`` is the index of the first image.

        Raises:
            Cancelled, InputError, NumericError, BackendError: as :meth:`ddpmx.Pipeline.evaluate`.
        """
        total = np.zeros_like(x)
        for t, weight in self.neighbours(level):
            total += np.float32(weight) * self._evaluated(x, t, first).eps
        return total

    def x0(self, x: Float32, first: int = 0) -> Float32:
        """x̂_0 of states at t = 0, clipped as in the model's chain, float32 [n, C, H, W]."""
        x0: Float32 = self._evaluated(x, 0, first).x0
        return x0

    def _evaluated(self, x: Float32, t: int, first: int) -> Any:
        if self._cancel is not None and self._cancel():
            raise Cancelled("cancelled before the chain finished")
        self.calls += len(x)
        return self._pipeline.evaluate(x, t, first=first, **self._conditioning)
