"""The terms of the bound: Φ by a continued fraction, levels by quadrature, KL by integration, and torch's own."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from ddpmx.diffusion import bound
from ddpmx.diffusion.samplers import VARIANCES, make_table
from ddpmx.diffusion.schedule import make_schedule

HO = make_schedule("linear", 1000)
LEVELS = np.arange(256) / 127.5 - 1


def log_density(x, mean, sigma):
    return -0.5 * ((x - mean) / sigma) ** 2 - math.log(sigma * math.sqrt(2 * math.pi))


def log_integral(low, high, mean, sigma):
    """log of the integral of N(mean, σ²) by Gauss–Legendre with 60 points, scaled by its largest value."""
    at, weights = np.polynomial.legendre.leggauss(60)
    logs = log_density((high - low) / 2 * at + (high + low) / 2, mean, sigma)
    return logs.max() + math.log(np.sum(weights * np.exp(logs - logs.max())) * (high - low) / 2)


# --- Φ ---------------------------------------------------------------------------------------------------------------


def log_tail(x):
    """log Φ(−x) for x ≥ 5 by Laplace's continued fraction, φ(x)/(x + 1/(x + 2/(x + 3/…)))."""
    below = x
    for k in range(400, 0, -1):
        below = x + k / below
    return -0.5 * x * x - 0.5 * math.log(2 * math.pi) - math.log(below)


@pytest.mark.parametrize("x", [5.0, 8.5, 19.999, 20.0, 20.001, 37.0, 38.0, 100.0, 1e4, 1e8])
def test_far_below_phi_is_its_continued_fraction(x):
    assert bound.log_normal_cdf(-x) == pytest.approx(log_tail(x), rel=1e-14)
    assert bound.log_normal_cdf(x) == pytest.approx(-math.exp(log_tail(x)), rel=1e-12)  # 1 − Φ keeps its digits


def test_phi_is_the_standard_library_s_in_the_middle():
    x = np.linspace(-3, 3, 61).reshape(1, 61)
    wanted = np.log(np.vectorize(NormalDist().cdf)(x))
    np.testing.assert_allclose(bound.log_normal_cdf(x), wanted, rtol=1e-10)
    assert bound.log_normal_cdf(np.array([0.0]))[0] == math.log(0.5)


# --- levels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [1e-3, 0.0074, 0.05, 1.0, 30.0])
@pytest.mark.parametrize("mean", [0.0, 0.3, -0.99, 1.0, -2.0])
def test_all_levels_together_have_the_probability_1(mean, sigma):
    assert np.exp(bound.level_log_likelihood(LEVELS, mean, math.log(sigma))).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("sigma", [0.003, 0.0074, 0.05, 1.0])
@pytest.mark.parametrize("apart", [0.0, 0.002, 0.03, -0.7, 1.5])
def test_a_level_is_the_integral_of_the_density(apart, sigma):
    for level in (1, 100, 254):
        x, half = LEVELS[level], 1 / 255
        found = bound.level_log_likelihood(x, x + apart, math.log(sigma))
        assert found == pytest.approx(log_integral(x - half, x + half, x + apart, sigma), rel=1e-8), level


def test_the_outermost_levels_are_open():
    lowest, highest = NormalDist(-0.9, 0.1).cdf(-1 + 1 / 255), 1 - NormalDist(0.9, 0.1).cdf(1 - 1 / 255)
    assert bound.level_log_likelihood(-1.0, -0.9, math.log(0.1)) == pytest.approx(math.log(lowest), rel=1e-12)
    assert bound.level_log_likelihood(1.0, 0.9, math.log(0.1)) == pytest.approx(math.log(highest), rel=1e-12)
    # as far out as σ is small: what a difference of Φ would call 0
    assert bound.level_log_likelihood(1.0, 3.0, math.log(0.1)) == pytest.approx(0, abs=1e-80)
    assert bound.level_log_likelihood(1.0, -3.0, math.log(0.1)) == pytest.approx(
        log_tail((4 - 1 / 255) / 0.1), rel=1e-12
    )


@pytest.mark.parametrize("sigma", [0.003, 0.0074, 0.05, 1.0])
def test_the_slope_of_a_level_and_what_its_curve_can_be(sigma):
    """By the difference quotient; log-concave, and never curved more than the Gaussian itself."""
    means, step = np.linspace(-1.1, 1.1, 89)[:, None], 1e-4 * sigma
    at = [bound.level_log_likelihood(LEVELS[::15], means + shift, math.log(sigma)) for shift in (-step, 0, step)]
    slope = bound.level_slope(LEVELS[::15], means, math.log(sigma))
    np.testing.assert_allclose(slope, (at[2] - at[0]) / (2 * step), rtol=1e-5, atol=1e-5 / sigma)
    further = bound.level_slope(LEVELS[::15], means + 0.3 * sigma, math.log(sigma))
    curve = (further - slope) / (0.3 * sigma)
    assert np.all(curve <= 1e-9 / sigma**2)
    assert np.all(curve >= -(1 + 1e-9) / sigma**2)


# --- KL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "sigma", "mean_p", "sigma_p"), [(0, 1, 0, 1), (0.3, 0.2, 0.1, 0.5), (-1, 2, 4, 1.5)])
def test_kl_is_its_integral(mean, sigma, mean_p, sigma_p):
    x = np.linspace(mean - 12 * sigma, mean + 12 * sigma, 200_001)
    q = log_density(x, mean, sigma)
    wanted = np.sum(np.exp(q) * (q - log_density(x, mean_p, sigma_p))) * (x[1] - x[0])
    found = bound.gaussian_kl(mean, 2 * math.log(sigma), mean_p, 2 * math.log(sigma_p))
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_what_is_left_of_l_t_keeps_its_digits():
    """For x_0 = 0, L_T = ½·(−log(1−ᾱ) − ᾱ) = Σ_{k≥2} ᾱᵏ/(2k), which is 4e−10 nats for Ho's schedule."""
    kept = HO.alpha_bar[-1]
    wanted = sum(kept**k / (2 * k) for k in range(2, 6))
    assert wanted < 5e-10
    assert bound.prior_term(HO, np.zeros(1))[0] == pytest.approx(wanted, rel=1e-7)
    assert bound.prior_term(HO, 1.0) == pytest.approx(wanted + kept / 2, rel=1e-7)


def test_a_transition_compares_the_two_means_of_x_t():
    """Equation 5 with the means of equation 7 written out, each with its x_t."""
    rng = np.random.default_rng(0)
    x0, guess, x_t = rng.uniform(-1, 1, (3, 5, 2, 3, 3))
    t = np.array([1, 2, 30, 500, 999])[:, None, None, None]
    beta, kept = np.linspace(1e-4, 0.02, 1000), np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    b, now, before = beta[t], kept[t], kept[t - 1]
    mean, mean_p = ((np.sqrt(before) * b * x + np.sqrt(1 - b) * (1 - before) * x_t) / (1 - now) for x in (x0, guess))
    variance = b * (1 - before) / (1 - now)
    wanted = 0.5 * (np.log(b / variance) + (variance + (mean - mean_p) ** 2) / b - 1)
    np.testing.assert_allclose(bound.transition_term(HO, t, x0, guess, np.log(b)), wanted, rtol=1e-7, atol=1e-15)


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_variance_is_the_chain_s(variance):
    """Where a chain adds noise; at t = 0 it is β̃_1, which a fixed variance has there for the decoder."""
    found, table = bound.log_variance(HO, variance), make_table(HO, "eps", variance)
    c, d = found.T
    v = 0.4
    sigma = np.exp(0.5 * (c + d * v))[::-1]
    chain = table.rows[:, 4] if table.learned is None else np.exp(table.learned[:, 0] + table.learned[:, 1] * v)
    np.testing.assert_allclose(sigma[:-1], chain[:-1], rtol=1e-12)
    if variance.startswith("fixed"):
        assert np.exp(c[0]) == pytest.approx(HO.posterior_variance[1])


def test_bits_per_dim_is_the_mean_over_the_numbers():
    nats = np.log(2.0) * np.arange(24).reshape(2, 3, 2, 2)
    np.testing.assert_allclose(bound.bits_per_dim(nats), [5.5, 17.5])


# --- torch's ---------------------------------------------------------------------------------------------------------


@pytest.mark.torch
def test_training_computes_the_same():
    torch = pytest.importorskip("torch", reason="not verified here: the bound against torch's")
    from ddpm_export.training import objective

    assert objective.HALF_LEVEL == bound.HALF_LEVEL
    rng = np.random.default_rng(3)
    x0 = rng.choice(LEVELS, 4000)
    mean, log_sigma = x0 + rng.choice([0.002, 0.05, 0.5], 4000) * rng.standard_normal(4000), rng.uniform(-6, 1, 4000)
    theirs = objective.level_log_likelihood(*(torch.from_numpy(a) for a in (x0, mean, log_sigma)))
    np.testing.assert_allclose(bound.level_log_likelihood(x0, mean, log_sigma), theirs.numpy(), rtol=1e-8, atol=1e-12)
    theirs = objective.gaussian_kl(*(torch.from_numpy(a) for a in (x0, log_sigma, mean, log_sigma[::-1].copy())))
    found = bound.gaussian_kl(x0, log_sigma, mean, log_sigma[::-1])
    np.testing.assert_allclose(found, theirs.numpy(), rtol=1e-9, atol=1e-12)
