"""Which of the T timesteps a chain visits: spacings even in t, and spacings even in how much of the image is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ddpmx.diffusion import elementary
from ddpmx.diffusion.schedule import Float64, Schedule
from ddpmx.errors import InputError

Spacing = Literal["linspace", "leading", "trailing", "quad", "logsnr", "karras"]
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)

LEAST_LOG_SNR = -5.1
"""Where the spacings by λ begin at the latest. The linear schedule ends at −5.06, with √ᾱ = 0.006; cosine goes on to −10,
where x is noise already. DPM-Solver's authors end there as well (Lu et al. 2022, appendix D of "DPM-Solver")."""

KARRAS_RHO = 7.0

SEEN = 0.05
"""√ᾱ above which an image can be seen in the noise. The paper's schedule ends at 0.006, that of latent models at 0.068."""


def log_snr(schedule: Schedule) -> Float64:
    """λ_t = ln(√ᾱ_t/√(1−ᾱ_t)), float64 [T], falling; −∞ where ᾱ = 0. Half the logarithm of :attr:`Schedule.snr`."""
    return 0.5 * (elementary.log(schedule.alpha_bar) - elementary.log(schedule.one_minus_alpha_bar))


def image_expected(schedule: Schedule, t: int) -> float | None:
    """√ᾱ_t if a network expects to see an image in x_t, where a chain that begins there has only noise; else None.

    501 of 1000 timesteps by ``leading`` begin at t = 500. A schedule that ends with as much itself has no t of that kind.
    """
    kept = schedule.alpha_bar**0.5
    return float(kept[t]) if kept[t] > max(SEEN, 2 * kept[-1]) else None


def timestep_grid(
    T: int, steps: int, spacing: Spacing = "linspace", *, log_snr: Callable[[], Float64] | None = None
) -> NDArray[np.int64]:
    """``steps`` of the timesteps 0…T−1, rising.

    - ``linspace``: both ends and even gaps, round(i·(T−1)/(S−1)) (guided-diffusion; one step is T−1 alone).
    - ``leading``: 0, k, 2k, … with k = T // S (diffusers' and DDIM's default).
    - ``trailing``: T−1, T−1−T/S, … (Lin et al. 2023).
    - ``quad``: dense near t = 0, up to 0.8·T (DDIM's CIFAR-10 figures).
    - ``logsnr``: even gaps in λ (Lu et al. 2022), from t = 0 to T−1, or to where λ falls below :data:`LEAST_LOG_SNR`.
    - ``karras``: even gaps in (σ/α)^(1/7) = e^(−λ/7) between the same ends (Karras et al. 2022, equation 5).

    The last two take the timestep whose λ is nearest, and the next one where that is taken already.

    Args:
        T: the length of the chain.
        steps: S.
        spacing: one of :data:`SPACINGS`.
        log_snr: gives λ_t of each timestep, see :func:`log_snr`; called for the spacings by λ, which need it.

    Raises:
        InputError: ``steps`` outside 1…T, an unknown spacing, one that cannot make that many distinct steps, or one by λ
            without ``log_snr``.
    """
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or not 1 <= steps <= T:
        raise InputError(f"steps must be a whole number from 1 to {T}, not {steps!r}", note=f"the model has T = {T}")
    if spacing not in SPACINGS:
        raise InputError(f"there is no spacing {spacing!r}", hint=f"one of: {', '.join(SPACINGS)}")
    if steps == T:
        return np.arange(T)
    if spacing in ("logsnr", "karras"):
        if log_snr is None:
            raise InputError(f"{spacing!r} spacing follows the schedule's λ", hint="pass log_snr")
        return _by_log_snr(log_snr(), int(steps), spacing)
    i = np.arange(steps, dtype=np.float64)
    if spacing == "linspace":
        grid = np.round(i * (T - 1) / (steps - 1)) if steps > 1 else np.array([T - 1.0])
    elif spacing == "leading":
        grid = i * (T // steps)
    elif spacing == "trailing":
        grid = np.round(T - (steps - i - 1) * T / steps) - 1
    else:
        grid = np.floor(np.linspace(0, np.sqrt(T * 0.8), steps) ** 2)
    if np.any(np.diff(grid) <= 0):
        raise InputError(
            f"{spacing!r} spacing cannot pick {steps} different steps out of {T}", hint="fewer steps, or linspace"
        )
    return grid.astype(np.int64)


def _by_log_snr(falling: Float64, steps: int, spacing: Spacing) -> NDArray[np.int64]:
    """The timesteps nearest to where λ should be, none twice. A single step is the noisiest."""
    falling = np.minimum.accumulate(falling)  # where the logarithms' rounding is all that tells two apart
    T, most = len(falling), falling[0]
    least = max(falling[-1], min(LEAST_LOG_SNR, most))
    share = np.arange(steps, dtype=np.float64) / (steps - 1) if steps > 1 else np.array([1.0])
    if spacing == "logsnr":
        wanted = most + share * (least - most)
    else:
        low, high = elementary.exp(np.array([most, least]) / -KARRAS_RHO)
        wanted = -KARRAS_RHO * elementary.log(low + share * (high - low))
    after = np.minimum(np.searchsorted(-falling, -wanted), T - 1)  # the first t whose λ is not larger
    before = np.maximum(after - 1, 0)
    grid = np.where(falling[before] - wanted <= wanted - falling[after], before, after)
    position = np.arange(steps)
    grid = np.maximum.accumulate(grid - position) + position
    return np.asarray(np.minimum(grid, T - steps + position), np.int64)
