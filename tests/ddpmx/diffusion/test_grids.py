"""Which timesteps a chain visits: grids even in t, and grids even in the signal that is left."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpmx.diffusion.grids import LEAST_LOG_SNR, SPACINGS, image_expected, log_snr, timestep_grid
from ddpmx.diffusion.samplers import make_table
from ddpmx.diffusion.schedule import SCHEDULES, make_schedule
from ddpmx.errors import InputError

LENGTH_AND_STEPS = st.integers(1, 3000).flatmap(lambda T: st.tuples(st.just(T), st.integers(1, T)))


@pytest.mark.parametrize("spacing", SPACINGS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(counts=LENGTH_AND_STEPS)
def test_a_grid_rises_strictly_within_the_chain(spacing, counts):
    T, steps = counts
    try:
        grid = timestep_grid(T, steps, spacing, log_snr=lambda: log_snr(make_schedule("cosine", T)))
    except InputError:
        assert spacing == "quad"  # dense near 0: the only one that can want a timestep twice
        return
    assert len(grid) == steps
    assert grid[0] >= 0
    assert grid[-1] < T
    assert np.all(np.diff(grid) > 0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(counts=LENGTH_AND_STEPS)
def test_linspace_is_even_to_half_a_step_and_has_both_ends(counts):
    T, steps = counts
    grid = timestep_grid(T, steps, "linspace").tolist()
    assert grid[-1] == T - 1
    if steps > 1:
        assert grid[0] == 0
        assert all(abs(g - Fraction(i * (T - 1), steps - 1)) <= Fraction(1, 2) for i, g in enumerate(grid))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(counts=LENGTH_AND_STEPS)
def test_trailing_counts_back_from_the_last_step(counts):
    T, steps = counts
    grid = timestep_grid(T, steps, "trailing").tolist()
    assert grid[-1] == T - 1
    for back, g in enumerate(reversed(grid)):
        assert abs(g + 1 - (T - Fraction(back * T, steps))) <= Fraction(1, 2)


@pytest.mark.parametrize(
    ("schedule", "t", "kept"),
    [
        ("linear", 999, None),
        ("linear", 799, None),  # where "quad" begins
        ("linear", 500, 0.28),
        ("cosine", 999, None),
        ("cosine", 500, 0.71),  # half-way cos(π/4), but for its offset
    ],
)
def test_an_image_is_expected_where_it_can_be_seen(schedule, t, kept):
    assert image_expected(make_schedule(schedule, 1000), t) == (None if kept is None else pytest.approx(kept, abs=1e-2))


def test_leading_is_a_whole_stride_from_zero():
    assert timestep_grid(1000, 50, "leading").tolist() == list(range(0, 1000, 20))
    assert timestep_grid(10, 3, "leading").tolist() == [0, 3, 6]


def test_quad_is_squares_up_to_four_fifths():
    grid = timestep_grid(1000, 20, "quad")
    exact = 800 * (np.arange(20) / 19) ** 2
    assert np.all(grid <= exact + 1e-9)
    assert np.all(grid > exact - 1)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_as_many_steps_as_there_are_is_every_step(spacing):
    assert timestep_grid(17, 17, spacing).tolist() == list(range(17))


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.0, True, "10", None])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(InputError, match="steps"):
        timestep_grid(1000, steps)


def test_a_spacing_that_would_repeat_a_step_is_refused():
    with pytest.raises(InputError, match="different steps"):
        timestep_grid(1000, 900, "quad")
    with pytest.raises(InputError, match="no spacing"):
        timestep_grid(1000, 10, "log")


@pytest.mark.torch
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_diffusers_walks_the_same_grid(spacing):
    """A position exactly between two timesteps may be rounded either way; all others must be equal."""
    diffusers = pytest.importorskip("diffusers", reason="not verified here: that diffusers walks the same grids")
    scheduler = diffusers.DDPMScheduler(1000, timestep_spacing=spacing)
    for steps in (2, 4, 5, 7, 10, 16, 20, 25, 50, 64, 100, 200, 250, 333, 500, 1000):
        scheduler.set_timesteps(steps)
        theirs, ours = scheduler.timesteps.numpy()[::-1], timestep_grid(1000, steps, spacing)
        i = np.arange(steps)
        exact = {"leading": i, "trailing": (i + 1) * 1000 / steps, "linspace": i * 999 / (steps - 1)}[spacing]
        between = np.abs(exact % 1 - 0.5) < 1e-6
        assert np.all(ours[~between] == theirs[~between])
        assert np.all(np.abs(ours - theirs) <= between)


# --- even in λ -------------------------------------------------------------------------------------------------------

BY_LOG_SNR = ("logsnr", "karras")


def wanted(spacing, first, last, steps):
    """λ where the papers put the steps, from ``first`` to ``last``."""
    if spacing == "logsnr":
        return np.linspace(first, last, steps)
    sigma = np.linspace(np.exp(-first) ** (1 / 7), np.exp(-last) ** (1 / 7), steps) ** 7
    return -np.log(sigma)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "jsd"])
def test_lambda_is_half_the_logarithm_of_the_signal_to_noise_ratio(name):
    schedule = make_schedule(name, 1000)
    np.testing.assert_allclose(log_snr(schedule), np.log(np.sqrt(schedule.snr)), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("spacing", BY_LOG_SNR)
@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "jsd"])
@pytest.mark.parametrize("steps", [2, 5, 12])
def test_each_timestep_is_the_nearest(spacing, name, steps):
    """By brute force. So many steps are apart, so the rule for those that are not does not come in."""
    level = np.log(np.sqrt(make_schedule(name, 2000).snr))
    last = max(level[-1], LEAST_LOG_SNR)
    grid = timestep_grid(2000, steps, spacing, log_snr=lambda: log_snr(make_schedule(name, 2000)))
    nearest = [int(np.abs(level - w).argmin()) for w in wanted(spacing, level[0], last, steps)]
    if len(set(nearest)) == steps:
        assert grid.tolist() == nearest
    else:
        assert np.all(grid >= nearest)
    assert grid[0] == 0


@pytest.mark.parametrize("spacing", BY_LOG_SNR)
def test_most_of_the_schedules_above_have_steps_apart(spacing):
    """The control of the test before: its first case has to occur."""
    assert timestep_grid(2000, 12, spacing, log_snr=lambda: log_snr(make_schedule("linear", 2000)))[1] > 1


@pytest.mark.parametrize("spacing", BY_LOG_SNR)
@pytest.mark.parametrize("steps", [50, 500, 999])
def test_timesteps_that_coincide_move_to_the_next(spacing, steps):
    """λ leaps at small t, so an even spacing wants the first timesteps several times."""
    grid = timestep_grid(1000, steps, spacing, log_snr=lambda: log_snr(make_schedule("linear", 1000)))
    assert grid[:2].tolist() == [0, 1]
    assert np.all(np.diff(grid) >= 1)
    assert grid[-1] == 999


@pytest.mark.parametrize("spacing", BY_LOG_SNR)
def test_a_schedule_that_goes_on_into_pure_noise_is_begun_where_the_linear_one_ends(spacing):
    cosine = make_schedule("cosine", 1000)
    last = int(timestep_grid(1000, 10, spacing, log_snr=lambda: log_snr(cosine))[-1])
    assert np.sqrt(cosine.snr[last + 1]) < np.exp(LEAST_LOG_SNR) < np.sqrt(cosine.snr[last - 1])
    jsd = make_schedule("jsd", 1000)  # ᾱ = 0 at its end
    assert timestep_grid(1000, 3, spacing, log_snr=lambda: log_snr(jsd))[-1] < 999


@pytest.mark.parametrize("spacing", BY_LOG_SNR)
def test_one_step_is_the_noisiest(spacing):
    assert make_table(make_schedule("linear", 1000), "eps", "fixed_small", steps=1, spacing=spacing).timesteps == [999]


@pytest.mark.parametrize("spacing", BY_LOG_SNR)
def test_a_spacing_by_lambda_needs_it(spacing):
    with pytest.raises(InputError, match=f"'{spacing}' spacing follows"):
        timestep_grid(1000, 10, spacing)
    assert make_table(make_schedule("linear", 1000), "eps", "fixed_small", steps=10, spacing=spacing).timesteps[-1] == 0
