"""The variational bound on −log p(x_0), term by term: equations 5, 7 and 13 of Ho et al. (2020), float64, in nats.

    L = L_T + Σ_{t≥1} L_{t} + L_0

    L_T = KL(q(x_T | x_0) ‖ N(0, I))                       nothing trains it
    L_t = KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t))     t = 1…T−1, as code counts
    L_0 = −log p(x_0 | x_t) at t = 0                       of the image's 256 levels

Every function gives a value for each number of an image; their sum over an image is its term. By :func:`bits_per_dim` it is
in bits per dimension, the mean over the numbers divided by ln 2.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddpmx.diffusion import elementary
from ddpmx.diffusion.samplers import LEARNED_VARIANCES, Variance, learned_log, learned_range
from ddpmx.diffusion.schedule import Float64, Schedule

HALF_LEVEL = 1 / 255
"""Half of the distance of two of the 256 levels in [−1, 1]."""

_FAR = -20.0
"""Below it log Φ is a series, whose first term that is left out is 1e−15 there."""


def log_variance(schedule: Schedule, variance: Variance) -> Float64:
    """The columns c and d of log σ²_t = c + d·v, float64 [S, 2]; v is the network's output ``var``, d = 0 without.

    At t = 0, where a chain adds no noise, it is the decoder's: β̃_1 for fixed variances, as in Ho's code.
    """
    if variance in LEARNED_VARIANCES:
        return 2 * (learned_range(schedule) if variance == "learned_range" else learned_log(schedule))
    fixed = schedule.log_variance_large if variance == "fixed_large" else schedule.log_variance_small
    return np.stack([fixed, np.zeros_like(fixed)], axis=1)


def prior_term(schedule: Schedule, x0: ArrayLike) -> Float64:
    """L_T of every number of x_0: the information about an image that is left in x_T, which sampling does not have."""
    signal = math.sqrt(schedule.alpha_bar[-1])
    log_rest = elementary.log(schedule.one_minus_alpha_bar[-1:])[0]
    return gaussian_kl(signal * np.asarray(x0, np.float64), log_rest, 0.0, 0.0)


def transition_term(
    schedule: Schedule, t: NDArray[np.integer], x0: Float64, x0_hat: Float64, log_var: Float64
) -> Float64:
    """L_t of every number, t ≥ 1.

    The means of both are μ̃(x_t, ·) of equation 7, of x_0 here and x̂_0 there: x_t itself drops out.

    Args:
        schedule: the chain's.
        t: steps of it, 1…S−1, in a shape that broadcasts with the images.
        x0, x0_hat: the images and the estimates of them.
        log_var: log σ² of p.
    """
    of_x0 = schedule.posterior_mean_coef_x0[t]
    return gaussian_kl(of_x0 * x0, schedule.log_variance_small[t], of_x0 * x0_hat, log_var)


def decoder_term(x0: Float64, x0_hat: Float64, log_var: Float64) -> Float64:
    """L_0 of every number: at t = 0 the mean of p is x̂_0 itself."""
    return -level_log_likelihood(x0, x0_hat, 0.5 * log_var)


def bits_per_dim(nats: Float64) -> Float64:
    """Of values for every number, [n, …], those of the images in bits per dimension, [n]."""
    means: Float64 = nats.reshape(len(nats), -1).mean(axis=1) / math.log(2)
    return means


def gaussian_kl(mean: ArrayLike, log_var: ArrayLike, mean_p: ArrayLike, log_var_p: ArrayLike) -> Float64:
    """KL(N(mean, e^log_var) ‖ N(mean_p, e^log_var_p)) of every number, in nats. Any shapes that broadcast.

    Where a variance is out of float64's range, so is the result.
    """
    mean, log_var, mean_p, log_var_p = (np.asarray(a, np.float64) for a in (mean, log_var, mean_p, log_var_p))
    ratio = log_var - log_var_p
    with np.errstate(over="ignore", invalid="ignore"):
        # e^r − 1 − r by expm1: L_T of a long chain is what is left of 4e−5 here
        kl: Float64 = 0.5 * (np.expm1(ratio) - ratio + np.square(mean - mean_p) * np.exp(-log_var_p))
    return kl


def level_log_likelihood(x0: ArrayLike, mean: ArrayLike, log_sigma: ArrayLike) -> Float64:
    """log p(x_0) of each of the 256 levels under N(mean, σ²), in nats: equation 13, the "discrete decoder".

    The density is integrated over a level's ±1/255, and from the outermost levels to infinity. The result keeps its digits
    wherever the level is, unlike a difference of Φ, which is 0 ten σ away.

    Args:
        x0: levels in [−1, 1].
        mean, log_sigma: of the Gaussian. Any shapes that broadcast.
    """
    x0, mean, log_sigma = np.broadcast_arrays(*(np.asarray(a, np.float64) for a in (x0, mean, log_sigma)))
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        scale = np.exp(-log_sigma)
        above, below = (x0 + HALF_LEVEL - mean) * scale, (x0 - HALF_LEVEL - mean) * scale
        # Φ(above) − Φ(below) = Φ(−below) − Φ(−above): on the side where both are small
        swapped = above + below > 0
        upper = log_normal_cdf(np.where(swapped, -below, above))
        lower = log_normal_cdf(np.where(swapped, -above, below))
        lowest, highest = x0 < -1 + HALF_LEVEL, x0 > 1 - HALF_LEVEL
        inside = upper + np.log(-np.expm1(lower - upper))
        outside = np.zeros_like(inside)
        outside[lowest], outside[highest] = log_normal_cdf(above[lowest]), log_normal_cdf(-below[highest])
    return np.where(lowest | highest, outside, inside)


def level_slope(x0: ArrayLike, mean: ArrayLike, log_sigma: ArrayLike) -> Float64:
    """The derivative of :func:`level_log_likelihood` by the mean: (φ(low) − φ(high))/(σ·p), of the ends of a level.

    It is the mean of (y − mean)/σ² for y of N(mean, σ²) within the level. The second derivative is from −1/σ² to 0: a
    Gaussian that is cut to a level varies less than a whole one.
    """
    x0, mean, log_sigma = np.broadcast_arrays(*(np.asarray(a, np.float64) for a in (x0, mean, log_sigma)))
    log_p = level_log_likelihood(x0, mean, log_sigma)
    with np.errstate(over="ignore", invalid="ignore"):
        scale = np.exp(-log_sigma)
        above, below = (x0 + HALF_LEVEL - mean) * scale, (x0 - HALF_LEVEL - mean) * scale
        high, low = (np.exp(-0.5 * z * z - 0.5 * math.log(2 * math.pi) - log_p) for z in (above, below))
        high, low = np.where(x0 > 1 - HALF_LEVEL, 0.0, high), np.where(x0 < -1 + HALF_LEVEL, 0.0, low)
        slope: Float64 = (low - high) * scale
    return slope


def log_normal_cdf(x: ArrayLike) -> Float64:
    """log Φ(x), float64 of the shape of x, exact to a few ulp also where Φ itself is too small for a float64.

    By erfc; far below 0 by Φ(x) ~ φ(x)/|x|·(1 − 1/x² + 3/x⁴ − 15/x⁶ + …) (Abramowitz & Stegun 26.2.12).
    """
    x = np.asarray(x, np.float64)
    far = x < _FAR
    near = np.where(far, 0.0, x)
    with np.errstate(divide="ignore"):
        # above 0 from the other side, where a small 1 − Φ(x) keeps its digits
        half = 0.5 * _erfc(np.abs(near) * math.sqrt(0.5))
        result = np.where(near > 0, np.log1p(-half), np.log(half))
    if far.any():
        z = x[far]
        with np.errstate(over="ignore"):
            square = z * z
            series, term = np.ones_like(z), np.ones_like(z)
            for k in range(1, 9):
                term = term * (1 - 2 * k) / square
                series = series + term
            result = np.array(result)
            result[far] = -0.5 * square - np.log(-z * math.sqrt(2 * math.pi)) + np.log(series)
    return result


_erfc_of_each = np.frompyfunc(math.erfc, 1, 1)


def _erfc(x: Float64) -> Float64:
    """NumPy has none; libm's of each number, at 0.1 µs."""
    return np.asarray(_erfc_of_each(x), np.float64)
