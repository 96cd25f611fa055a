"""What of an image is left in x_T, and what a perfect network then draws."""

from __future__ import annotations

import numpy as np
import pytest

from ddpmx.diffusion.last_step import drawn_mean, signal_left, signal_warning
from ddpmx.diffusion.samplers import make_table
from ddpmx.diffusion.schedule import SCHEDULES, make_schedule, scaled_params
from ddpmx.errors import InputError


@pytest.mark.parametrize(
    ("name", "params", "published"),
    [
        ("linear", {}, 0.006353),
        ("quad", {"beta_start": 0.00085, "beta_end": 0.012}, 0.068265),
        ("cosine", {}, 4.928e-5),
    ],
    ids=["Ho", "Stable Diffusion", "cosine"],
)
def test_the_signal_that_is_left_is_the_published_one(name, params, published):
    """Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", table 1."""
    assert signal_left(make_schedule(name, 1000, params)) == pytest.approx(published, rel=1e-3)


def test_a_perfect_network_s_chain_draws_the_mean_that_is_computed():
    """The runtime's own table, run over many images with the optimal ε for N(0.5, 0.4²)."""
    schedule = make_schedule("linear", 50)
    table = make_table(schedule, "eps", "fixed_small")
    rng = np.random.default_rng(0)
    x = rng.standard_normal(200_000)
    for t, (p, q, a, b, sigma) in zip(table.timesteps, table.rows, strict=True):
        alpha_bar = schedule.alpha_bar[t]
        eps = np.sqrt(1 - alpha_bar) / (alpha_bar * 0.16 + 1 - alpha_bar) * (x - np.sqrt(alpha_bar) * 0.5)
        x = a * (p * x + q * eps) + b * x + sigma * rng.standard_normal(len(x))
    assert x.mean() == pytest.approx(drawn_mean(schedule), abs=0.005)
    assert drawn_mean(schedule) == pytest.approx(0.40, abs=0.005)


@pytest.mark.parametrize("T", [30, 100, 1000, 4000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_scaled_schedules_end_in_noise_for_every_t(name, T):
    if name in ("cosine", "jsd", "sigmoid_alpha_bar"):
        with pytest.raises(InputError, match="not to be scaled"):
            scaled_params(name, T)
        assert signal_warning(make_schedule(name, T)) is None
        return
    scaled = make_schedule(name, T, scaled_params(name, T))
    assert signal_warning(scaled) is None
    whole = make_schedule(name, 1000)
    assert scaled.betas.sum() == pytest.approx(whole.betas.sum(), rel=0.03)
    assert (signal_warning(make_schedule(name, T)) is None) == (T >= 1000)


def test_scaling_by_too_much_is_refused():
    with pytest.raises(InputError, match="not below 1") as caught:
        scaled_params("linear", 20)
    assert "cosine" in caught.value.hint


def test_the_warning_has_the_figures():
    text = signal_warning(make_schedule("linear", 50))
    assert "√ᾱ_T = 0.78" in text
    assert "draws a mean of 0.40" in text
