"""Whether a chain is long enough: what of an image is left in x_T, although sampling begins with pure noise."""

from __future__ import annotations

import numpy as np

from ddpmx.diffusion.schedule import Schedule

MOST_SIGNAL = 0.05
"""The largest √ᾱ_T without a warning. The paper's is 0.006, "quad" has 0.028; Stable Diffusion's 0.068 is known to keep
all images near a medium brightness (Lin et al. 2024, table 1)."""

MEAN, STD = 0.5, 0.4
"""Of the data for which :func:`drawn_mean` is computed: bright images."""


def signal_left(schedule: Schedule) -> float:
    """√ᾱ_T: how much of x_0 is left in x_T = √ᾱ_T·x_0 + √(1−ᾱ_T)·ε (equation 4), 0…1."""
    return float(np.sqrt(schedule.alpha_bar[-1]))


def drawn_mean(schedule: Schedule, mean: float = MEAN, std: float = STD) -> float:
    """The mean of what a perfect network's chain draws if the data are N(``mean``, ``std``²), which it should equal.

    x̂_0 = E[x_0 | x_t] = (√ᾱ_t·s²·x_t + (1−ᾱ_t)·m) / (ᾱ_t·s² + 1−ᾱ_t) is linear in x_t, and so is the posterior's mean
    (equation 7); so the mean of x_t goes down the chain from 0, which it has at x_T ~ N(0, I).
    """
    alpha_bar, rest = schedule.alpha_bar, schedule.one_minus_alpha_bar
    total = alpha_bar * std**2 + rest
    of_x, constant = np.sqrt(alpha_bar) * std**2 / total, rest * mean / total
    slope = schedule.posterior_mean_coef_x0 * of_x + schedule.posterior_mean_coef_xt
    offset = schedule.posterior_mean_coef_x0 * constant
    x = 0.0
    for t in range(len(schedule) - 1, -1, -1):
        x = slope[t] * x + offset[t]
    return float(x)


def signal_warning(schedule: Schedule) -> str | None:
    """A line that says that T is too small for the schedule, with its figures; None if it is not."""
    left = signal_left(schedule)
    if left <= MOST_SIGNAL:
        return None
    drawn = drawn_mean(schedule)
    effect = f"of data with mean {MEAN:g} even a perfect network draws a mean of {drawn:.2f}"
    if abs(drawn - MEAN) < 0.005:
        effect = "whole images are drawn too near to medium grey"
    return (
        f"√ᾱ_T = {left:.2f}: after T = {len(schedule)} timesteps of this schedule x_T still holds that much of the image, "
        f"and sampling begins with pure noise; {effect}"
    )
