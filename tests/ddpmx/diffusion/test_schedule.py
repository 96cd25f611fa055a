"""β_t and what follows from it, against formulas written down a second time and against published figures."""

from __future__ import annotations

import math
from decimal import Decimal

import numpy as np
import pytest

from ddpmx.diffusion.samplers import ancestral
from ddpmx.diffusion.schedule import MAX_TIMESTEPS, SCHEDULES, Schedule, make_schedule, respace, schedule_params
from ddpmx.errors import InputError

T = 1000
LINEAR = make_schedule("linear", T)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# β_t as a formula of t, where it is one
BETA = {
    "linear": lambda t: 1e-4 + 0.0199 * t / 999,
    "quad": lambda t: (0.01 + (math.sqrt(0.02) - 0.01) * t / 999) ** 2,
    "const": lambda t: 0.02,
    "warmup10": lambda t: 1e-4 + 0.0199 * t / 99 if t < 100 else 0.02,
    "warmup50": lambda t: 1e-4 + 0.0199 * t / 499 if t < 500 else 0.02,
    "jsd": lambda t: 1 / (1000 - t),
    "sigmoid_beta": lambda t: 1e-4 + 0.0199 * sigmoid(-6 + 12 * t / 999),
}

# ᾱ as a formula of u = (t+1)/T, where that is what the schedule says
ALPHA_BAR = {
    "cosine": lambda u: (math.cos((u + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2,
    "sigmoid_alpha_bar": lambda u: (sigmoid(3) - sigmoid(6 * u - 3)) / (sigmoid(3) - sigmoid(-3)),
    "jsd": lambda u: 1 - u,
}


def test_every_schedule_has_a_formula_here():
    assert set(SCHEDULES) == set(BETA) | set(ALPHA_BAR)


@pytest.mark.parametrize("name", BETA)
def test_beta_follows_its_formula(name):
    expected = [BETA[name](t) for t in range(T)]
    np.testing.assert_allclose(make_schedule(name, T).betas, expected, rtol=1e-12)


@pytest.mark.parametrize("name", ALPHA_BAR)
def test_alpha_bar_follows_its_formula_up_to_the_cap(name):
    schedule = make_schedule(name, T)
    expected = np.array([ALPHA_BAR[name]((t + 1) / T) for t in range(T)])
    free = schedule.betas < 0.999  # where β is capped, ᾱ stays above its formula, so that it never reaches 0
    free[-1] = False
    assert free.sum() >= T - 2
    np.testing.assert_allclose(schedule.alpha_bar[free], expected[free], rtol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_alpha_bar_is_the_product_of_what_beta_leaves(name):
    schedule = make_schedule(name, T)
    product = 1.0
    for t, beta in enumerate(schedule.betas.tolist()):
        product *= 1.0 - beta
        assert schedule.alpha_bar[t] == pytest.approx(product, rel=1e-12)
    assert np.all(np.diff(schedule.alpha_bar) < 0)
    assert schedule.alpha_bar_prev[0] == 1
    np.testing.assert_array_equal(schedule.timesteps, np.arange(T))


@pytest.mark.parametrize(
    ("what", "value", "published"),
    [
        ("ᾱ_0", LINEAR.alpha_bar[0], "0.9999"),
        ("ᾱ_999", LINEAR.alpha_bar[-1], "4.0358e-5"),
        ("√(1/ᾱ), the largest", np.sqrt(1 / LINEAR.alpha_bar).max(), "157.41"),
        ("β̃_1", LINEAR.posterior_variance[1], "5.4532e-5"),
        ("ln β̃_1", LINEAR.log_variance_small[1], "-9.8167"),
        ("what x_0 is multiplied by at 999", LINEAR.posterior_mean_coef_x0[999], "1.2835e-4"),
        ("what x_t is multiplied by at 999", LINEAR.posterior_mean_coef_xt[999], "0.98995"),
        ("β/β̃ at 1", LINEAR.betas[1] / LINEAR.posterior_variance[1], "2.199"),
        ("β/β̃ at 2", LINEAR.betas[2] / LINEAR.posterior_variance[2], "1.64"),
        ("β/β̃ at 10", LINEAR.betas[10] / LINEAR.posterior_variance[10], "1.157"),
        ("β/β̃ at 100", LINEAR.betas[100] / LINEAR.posterior_variance[100], "1.018"),
        ("ᾱ_T of cosine", make_schedule("cosine", T).alpha_bar[-1], "2.4e-9"),
        ("ᾱ_T of sigmoid_alpha_bar", make_schedule("sigmoid_alpha_bar", T).alpha_bar[-1], "3.0e-7"),
        ("ᾱ_T of sigmoid_beta", make_schedule("sigmoid_beta", T).alpha_bar[-1], "3.97e-5"),
        ("ᾱ_T of jsd", make_schedule("jsd", T).alpha_bar[-1], "0e-300"),
    ],
)
def test_published_figures(what, value, published):
    last_digit = 10.0 ** Decimal(published).as_tuple().exponent
    assert value == pytest.approx(float(published), abs=last_digit, rel=0), what


def test_what_an_error_of_epsilon_does_to_the_chain():
    """The gain of ε on x_{t−1}, and its sum: why a network in float16 is good enough for a chain in float32."""
    rows = ancestral(LINEAR, "eps", "fixed_large").rows[::-1]
    gain = np.abs(rows[:, 2] * rows[:, 1])
    for t, published in ((0, 0.0101), (999, 0.0202)):
        assert round(gain[t], 4) == pytest.approx(published, abs=1.01e-4)
    assert round(gain.sum(), 2) == 11.48


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_is_the_product_of_two_gaussians(name):
    """Bayes: q(x_{t−1} | x_t, x_0) ∝ q(x_t | x_{t−1}) q(x_{t−1} | x_0), so precisions add."""
    schedule = make_schedule(name, T)
    beta, before = schedule.betas[1:], schedule.alpha_bar[:-1]
    variance = 1 / ((1 - beta) / beta + 1 / (1 - before))
    np.testing.assert_allclose(schedule.posterior_variance[1:], variance, rtol=1e-9)
    np.testing.assert_allclose(
        schedule.posterior_mean_coef_xt[1:], variance * np.sqrt(1 - beta) / beta, rtol=1e-9, atol=1e-15
    )
    np.testing.assert_allclose(
        schedule.posterior_mean_coef_x0[1:], variance * np.sqrt(before) / (1 - before), rtol=1e-9
    )
    assert schedule.posterior_variance[0] == 0


def test_tiny_betas_keep_their_digits():
    """1 − ᾱ_t is (t+1)·β to first order, and 1 − β = 1 in float64."""
    schedule, t = make_schedule("const", 100, {"beta_end": 1e-18}), np.arange(100)
    np.testing.assert_allclose(schedule.posterior_variance, 1e-18 * t / (t + 1), rtol=1e-12)
    np.testing.assert_allclose(schedule.posterior_mean_coef_x0, 1 / (t + 1), rtol=1e-12)
    np.testing.assert_allclose(schedule.snr, 1e18 / (t + 1), rtol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_log_variances_begin_with_the_second_posterior_variance(name):
    schedule = make_schedule(name, T)
    second = math.log(schedule.posterior_variance[1])
    assert schedule.log_variance_small[0] == pytest.approx(second, rel=1e-12)
    assert schedule.log_variance_large[0] == pytest.approx(second, rel=1e-12)
    np.testing.assert_allclose(np.exp(schedule.log_variance_small[1:]), schedule.posterior_variance[1:], rtol=1e-12)
    np.testing.assert_allclose(np.exp(schedule.log_variance_large[1:]), schedule.betas[1:], rtol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_signal_to_noise_falls_and_fits_alpha_bar(name):
    schedule = make_schedule(name, T)
    assert np.all(np.diff(schedule.snr) < 0)
    np.testing.assert_allclose(schedule.snr / (1 + schedule.snr), schedule.alpha_bar, rtol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_respacing_keeps_alpha_bar_and_makes_the_betas_fit(name):
    full = make_schedule(name, T)
    tau = np.array([0, 3, 4, 250, 700, 998, 999])
    part = respace(full, tau)
    assert len(part) == len(tau)
    np.testing.assert_array_equal(part.timesteps, tau)
    np.testing.assert_array_equal(part.alpha_bar, full.alpha_bar[tau])
    np.testing.assert_allclose(np.cumprod(1 - part.betas), full.alpha_bar[tau], rtol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_full_respacing_is_the_identity(name):
    full = make_schedule(name, T)
    same = respace(full, np.arange(T))
    np.testing.assert_array_equal(same.betas, full.betas)
    np.testing.assert_array_equal(same.alpha_bar, full.alpha_bar)


@pytest.mark.parametrize("tau", [[], [3, 3], [5, 2], [-1, 4], [0, T], [[1, 2]]])
def test_respacing_refuses_what_is_no_rising_part_of_the_chain(tau):
    with pytest.raises(InputError, match="rise"):
        respace(LINEAR, np.array(tau, np.int64))


@pytest.mark.parametrize("betas", [[], [0.0], [0.1, -0.1], [1.0001], [0.1, math.nan], [math.inf], [[0.1, 0.2]]])
def test_betas_outside_their_range_are_refused(betas):
    with pytest.raises(InputError):
        Schedule.from_betas(np.array(betas))


@pytest.mark.parametrize("steps", [0, -1, True, 10.0, "10", None, MAX_TIMESTEPS + 1])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(InputError, match="T must be"):
        make_schedule("linear", steps)


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_step_is_a_schedule(name):
    schedule = make_schedule(name, 1)
    assert np.all(np.isfinite(schedule.log_variance_small))
    assert schedule.posterior_mean_coef_x0[0] == pytest.approx(1, rel=1e-11)
    assert schedule.posterior_mean_coef_xt[0] == 0


def test_unknown_names_are_refused_and_the_known_ones_listed():
    with pytest.raises(InputError, match="sigmoid_alpha_bar"):
        make_schedule("sigmoid", T)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("jsd", {"beta_end": 0.02}),
        ("linear", {"T": 5}),
        ("linear", {"beta_start": "0.1"}),
        ("linear", {"beta_start": True}),
        ("linear", {"beta_start": None}),
        ("linear", {"beta_start": math.nan}),
        ("linear", {"beta_end": math.inf}),
        ("linear", {"beta_end": 10**30}),
        ("linear", {"beta_end": 10**400}),
        ("linear", {"beta_end": 2}),
        ("quad", {"beta_start": -1}),
        ("cosine", {"s": -1}),
        ("cosine", {"s": 1e308}),
        ("sigmoid_alpha_bar", {"tau": 0}),
        ("sigmoid_alpha_bar", {"tau": 1e-320}),
        ("sigmoid_alpha_bar", {"start": 1, "end": 1}),
    ],
)
def test_parameters_that_make_no_schedule_are_refused(name, params):
    with pytest.raises(InputError):
        make_schedule(name, T, params)


def test_parameters_reach_the_formula():
    assert schedule_params("linear", {"beta_end": 0.01}) == {"beta_start": 1e-4, "beta_end": 0.01}
    np.testing.assert_allclose(make_schedule("linear", 3, {"beta_start": 0.1, "beta_end": 0.3}).betas, [0.1, 0.2, 0.3])


@pytest.mark.torch
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("linear", "linear"), ("quad", "scaled_linear"), ("cosine", "squaredcos_cap_v2"), ("sigmoid_beta", "sigmoid")],
)
def test_diffusers_has_the_same_betas(ours, theirs, figure):
    diffusers = pytest.importorskip("diffusers", reason="not verified here: that diffusers has the same schedules")
    betas = diffusers.DDPMScheduler(T, 1e-4, 0.02, theirs).betas.double().numpy()
    # diffusers computes in float32
    worst = np.abs(make_schedule(ours, T).betas / betas - 1).max()
    figure(f"β of {ours}, relative to diffusers' {theirs}", worst, at_most=2e-4)
