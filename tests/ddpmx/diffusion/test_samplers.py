"""x̂_0 of what a network predicts, and the tables of the samplers without memory."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from ddpmx.diffusion.grids import SPACINGS, timestep_grid
from ddpmx.diffusion.samplers import (
    FIXED_VARIANCES,
    LEARNED_VARIANCES,
    PREDICTIONS,
    VARIANCES,
    ancestral,
    ddim,
    make_table,
    x0_coefficients,
)
from ddpmx.diffusion.schedule import SCHEDULES, make_schedule, respace
from ddpmx.errors import InputError, SpecError
from ddpmx.sampling import chain

LINEAR = make_schedule("linear", 1000)

ALPHA_BAR = np.cumprod(1 - np.array([1e-4 + 0.0199 * t / 999 for t in range(1000)]))  # the paper's, written down again

# --- x̂_0 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "jsd"])
def test_all_predictions_lead_back_to_the_same_x0(name):
    rng = np.random.default_rng(1)
    schedule = make_schedule(name, 1000)
    x0, eps = rng.uniform(-1, 1, 1000), rng.standard_normal(1000)
    signal, noise = np.sqrt(schedule.alpha_bar), np.sqrt(1 - schedule.alpha_bar)
    x = signal * x0 + noise * eps
    # μ̃ of equation 7, by completing the square in q(x_t | x_{t−1})·q(x_{t−1} | x_0)
    before = np.concatenate([[1.0], schedule.alpha_bar[:-1]])
    alpha, spread = schedule.alpha_bar / before, np.maximum(1 - before, 1e-300)
    precision = alpha / (1 - alpha) + 1 / spread
    mean = (np.sqrt(alpha) * x / (1 - alpha) + np.sqrt(before) * x0 / spread) / precision
    outputs = {"eps": eps, "x0": x0, "v": signal * eps - noise * x0, "mu": mean}
    for prediction in PREDICTIONS:
        p, q = x0_coefficients(schedule, prediction)
        assert np.all(np.abs(p * x + q * outputs[prediction] - x0) < 1e-10 + 1e-13 * np.abs(q))


def test_epsilon_cannot_lead_back_from_pure_noise():
    jsd = make_schedule("jsd", 1000)
    with pytest.raises(SpecError, match="ᾱ = 0"):
        x0_coefficients(jsd, "eps")
    for prediction in ("x0", "v"):
        assert np.all(np.isfinite(x0_coefficients(jsd, prediction)))


def one_update(row, x, out, limit=np.inf):
    x0, x_next = np.empty_like(x), np.empty_like(x)
    chain.update(row.astype(np.float32), limit, x, out, None, x0=x0, x_next=x_next)
    return x0, x_next


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_the_mean_that_a_network_predicts_is_what_the_chain_takes(t):
    """A·(p·x + q·μ) + B·x = μ to float32's accuracy, although q is 7600 at t = 999."""
    rng = np.random.default_rng(t)
    x, mu = rng.standard_normal((2, 4096)).astype(np.float32)
    row = make_table(LINEAR, "mu", "fixed_small").rows[999 - t]
    assert (row[1] > 7500) == (t == 999)
    _, x_next = one_update(row, x, mu)
    assert np.all(np.abs(x_next - mu) <= 6 * 2.0**-24 * (np.abs(x) + np.abs(mu)))


def test_a_predicted_mean_is_clipped_by_its_x0():
    row = make_table(LINEAR, "mu", "fixed_small").rows[0]
    x = np.zeros(1, np.float32)
    x0, x_next = one_update(row, x, np.ones(1, np.float32), 1.0)
    assert x0 == 1
    assert x_next == np.float32(row[2])  # A alone, 1.3e-4


@pytest.mark.parametrize("sampling", [{"steps": 10}, {"steps": 7, "sampler": "ddim", "eta": 0.5}])
def test_a_predicted_mean_is_that_of_a_single_step_in_a_shorter_chain_too(sampling):
    """The network knows μ̃ of t → t−1 and nothing of the timesteps that the chain leaves out."""
    table = make_table(LINEAR, "mu", "fixed_small", **sampling)
    rng = np.random.default_rng(0)
    for t, row in zip(table.timesteps, table.rows, strict=True):
        x0, x = rng.uniform(-1, 1, 64), rng.standard_normal(64)
        beta = 1e-4 + 0.0199 * t / 999
        before = ALPHA_BAR[t - 1] if t else 1.0
        mean = (np.sqrt(before) * beta * x0 + np.sqrt(1 - beta) * (1 - before) * x) / (1 - ALPHA_BAR[t])
        np.testing.assert_allclose(row[0] * x + row[1] * mean, x0, atol=1e-9)
    other = make_table(LINEAR, "eps", "fixed_small", **sampling)
    np.testing.assert_array_equal(table.rows[:, 2:], other.rows[:, 2:])


def test_unknown_predictions_are_refused():
    with pytest.raises(SpecError, match="prediction"):
        x0_coefficients(LINEAR, "score")


# --- tables ----------------------------------------------------------------------------------------------------------


def test_ancestral_is_algorithm_2():
    """Without clipping the update is the paper's: x_{t−1} = (x_t − β/√(1−ᾱ)·ε)/√α + σ·z."""
    beta = np.array([1e-4 + 0.0199 * t / 999 for t in range(1000)])
    alpha_bar = np.cumprod(1 - beta)
    for variance in ("fixed_small", "fixed_large"):
        table = ancestral(LINEAR, "eps", variance)
        assert table.timesteps.tolist() == list(range(999, -1, -1))
        p, q, a, b, sigma = table.rows[::-1].T
        np.testing.assert_allclose(a * p + b, 1 / np.sqrt(1 - beta), rtol=1e-10)
        np.testing.assert_allclose(a * q, -beta / np.sqrt((1 - alpha_bar) * (1 - beta)), rtol=1e-10)
        small = beta[1:] * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
        expected = small if variance == "fixed_small" else beta[1:]
        np.testing.assert_allclose(sigma[1:] ** 2, expected, rtol=1e-10)
        assert sigma[0] == 0


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "jsd"])
@pytest.mark.parametrize("eta", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [7, 1000])
def test_a_perfect_output_keeps_the_marginals(name, eta, steps):
    """From x_t = √ᾱ·x_0 + √(1−ᾱ)·ε a step must lead to N(√ᾱ_prev·x_0, 1−ᾱ_prev). ``None`` is ancestral fixed_small."""
    full = make_schedule(name, 1000)
    schedule = respace(full, timestep_grid(1000, steps))
    table = ddim(schedule, "v", eta) if eta is not None else ancestral(schedule, "v", "fixed_small")
    _, _, a, b, sigma = table.rows[::-1].T
    now = full.alpha_bar[table.timesteps[::-1]]
    before = np.concatenate([[1.0], now[:-1]])
    np.testing.assert_allclose(a + b * np.sqrt(now), np.sqrt(before), atol=1e-12)
    np.testing.assert_allclose(b**2 * (1 - now) + sigma**2, 1 - before, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_with_all_the_noise_is_the_ancestral_chain(name):
    schedule = make_schedule(name, 1000)
    chain, song = ancestral(schedule, "v", "fixed_small"), ddim(schedule, "v", 1.0)
    np.testing.assert_array_equal(chain.timesteps, song.timesteps)
    np.testing.assert_allclose(song.rows, chain.rows, rtol=1e-8, atol=1e-11)


def test_ddim_without_noise_draws_none():
    assert np.all(ddim(LINEAR, "eps", 0.0).rows[:, 4] == 0)
    half, full = ddim(LINEAR, "eps", 0.5).rows[:, 4], ddim(LINEAR, "eps", 1.0).rows[:, 4]
    np.testing.assert_allclose(half, full / 2, rtol=1e-12)


def _last_row(schedule, prediction, **sampling):
    table = make_table(schedule, prediction, "fixed_large", **sampling)
    assert table.memory is None or not table.memory[-1].any()
    return table.rows[-1, 2:].astype(np.float32).tolist()


LAST_STEPS = (
    *({}, {"sampler": "ddim"}, {"sampler": "ddim", "eta": 0.7}, {"sampler": "ddim", "eta": 1.0}),
    *({"sampler": "dpmpp_2m"}, {"sampler": "unipc"}),
)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("T", [1, 2, 10, 100, 1000, 10_000])
def test_the_last_step_gives_x0_itself(name, T):
    """Code that takes the sample from x̂_0 relies on A = 1, B = 0, σ = 0 to the last bit."""
    schedule = make_schedule(name, T)
    for spacing in SPACINGS if T >= 1000 else set(SPACINGS) - {"quad"}:
        for steps in {1, 2, 3, 10, T // 4, T - 1, T} & set(range(1, T + 1)):
            if spacing == "quad" and 10 < steps < T:
                continue  # more than it can pick
            for sampling in LAST_STEPS:
                row = _last_row(schedule, "v", steps=steps, spacing=spacing, **sampling)
                assert row == [1, 0, 0], (spacing, steps, sampling)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_last_step_gives_x0_itself_whatever_is_predicted(prediction):
    assert _last_row(LINEAR, prediction) == [1, 0, 0]


@pytest.mark.parametrize("beta_start", [1e-8, 1e-9, 1e-10, 1e-12, 3e-15])
def test_the_last_step_gives_x0_itself_where_the_first_beta_is_tiny(beta_start):
    """1 − ᾱ_0 is then not β_0 any more, so that β_0/(1 − ᾱ_0) alone misses 1."""
    assert _last_row(make_schedule("linear", 1000, {"beta_start": beta_start}), "eps") == [1, 0, 0]


def test_a_respaced_table_tells_the_network_the_original_timesteps():
    table = make_table(LINEAR, "eps", "fixed_large", steps=4)
    assert table.timesteps.tolist() == [999, 666, 333, 0]
    assert len(table) == 4


@pytest.mark.parametrize("steps", [1000, 50, 7])
def test_a_learned_variance_lies_between_the_two_fixed_ones(steps):
    """Nichol & Dhariwal, equation 15, on the chain that is really walked: v = −1 is β̃, v = 1 is β, 0 their mean."""
    small, large, learned = (make_table(LINEAR, "eps", variance, steps=steps) for variance in VARIANCES[:3])
    np.testing.assert_array_equal(learned.timesteps, small.timesteps)
    np.testing.assert_array_equal(learned.rows[:, :4], small.rows[:, :4])
    assert learned.rows[:, 4].tolist() == [1.0] * (steps - 1) + [0.0]
    c, d = learned.learned[:-1].T
    sigma_small, sigma_large = small.rows[:-1, 4], large.rows[:-1, 4]
    np.testing.assert_allclose(np.exp(c - d), sigma_small, rtol=1e-12)
    np.testing.assert_allclose(np.exp(c + d), sigma_large, rtol=1e-12)
    np.testing.assert_allclose(np.exp(c), np.sqrt(sigma_small * sigma_large), rtol=1e-12)
    np.testing.assert_allclose(np.exp(c + 3 * d), sigma_large**2 / sigma_small, rtol=1e-12)  # v is held nowhere


def test_a_learned_variance_at_the_last_step_is_that_of_the_paper():
    """Not drawn, but p(x_0 | x_1) is judged by it: β̃_0, which is 0, gives way to β̃_1, and β_0 stays."""
    beta = np.array([1e-4 + 0.0199 * t / 999 for t in range(2)])
    posterior = beta[1] * beta[0] / (1 - (1 - beta[0]) * (1 - beta[1]))
    c, d = ancestral(LINEAR, "eps", "learned_range").learned[-1]
    assert np.exp(2 * (c + d)) == pytest.approx(beta[0], rel=1e-10)
    assert np.exp(2 * (c - d)) == pytest.approx(posterior, rel=1e-10)


def test_only_the_ancestral_sampler_asks_for_a_learned_variance():
    for eta in (0.0, 1.0):
        fixed = make_table(LINEAR, "eps", "fixed_large", sampler="ddim", eta=eta, steps=9)
        for variance in LEARNED_VARIANCES:
            learned = make_table(LINEAR, "eps", variance, sampler="ddim", eta=eta, steps=9)
            assert learned.learned is None
            np.testing.assert_array_equal(learned.rows, fixed.rows)
    for variance in FIXED_VARIANCES:
        table = make_table(LINEAR, "eps", variance)
        assert table.learned is None
        np.testing.assert_array_equal(table.coefficients, table.rows)


@pytest.mark.parametrize(("steps", "taken"), [(999, 999), (1, 1), (50, 50)])
def test_the_variance_of_single_steps_is_not_that_of_longer_ones(steps, taken):
    with pytest.raises(InputError, match=f"variance of single steps, and this chain takes {taken} of 1000") as caught:
        make_table(LINEAR, "eps", "learned", steps=steps)
    assert caught.value.hint == "sampler ddim, or variance fixed_small"
    for variance in ("learned_range", "fixed_small"):
        make_table(LINEAR, "eps", variance, steps=steps)
    assert len(make_table(LINEAR, "eps", "learned", steps=steps, sampler="ddim")) == taken


@pytest.mark.parametrize("sampling", [{}, {"steps": 1000}, {"start": 400}])
def test_a_learned_log_variance_is_taken_as_it_is(sampling):
    """σ = exp(var/2) at every t, and none in the last step."""
    table = make_table(LINEAR, "eps", "learned", **sampling)
    for log_variance in (-9.2, -4.0, 0.3):
        np.testing.assert_allclose(np.exp(table.learned @ [1, log_variance]) ** 2, np.exp(log_variance), rtol=1e-14)
    assert table.rows[:, 4].tolist() == [1.0] * (len(table) - 1) + [0.0]


def test_one_step_of_a_learned_variance_draws_no_noise():
    table = make_table(LINEAR, "eps", "learned_range", steps=1)
    assert table.rows[0, 4] == 0
    assert np.isfinite(table.coefficients).all()


@pytest.mark.parametrize(
    ("name", "T", "params"),
    [
        ("linear", 1000, {"beta_start": 1e-17}),  # ᾱ_0 = 1
        ("linear", 1000, {"beta_start": 1e-300, "beta_end": 1e-300}),  # ᾱ = 1 throughout
        ("const", 2000, {"beta_end": 0.5}),  # ᾱ underflows to 0
        ("const", 10, {"beta_end": 1.0}),
        ("jsd", 1000, {}),
    ],
)
@pytest.mark.parametrize("sampling", LAST_STEPS)
@pytest.mark.parametrize("share", [1, 5])
def test_a_table_has_numbers_or_is_refused(name, T, params, sampling, share):
    """A NaN here would come out as an image, or as a complaint about the network."""
    schedule = make_schedule(name, T, params)
    with np.errstate(all="ignore"), contextlib.suppress(InputError, SpecError):
        for variance in VARIANCES[:3] if share > 1 else VARIANCES:
            table = make_table(schedule, "v", variance, steps=T // share, **sampling)
            assert np.all(np.isfinite(table.coefficients.astype(np.float32)))


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize(
    "sampling", [{}, {"steps": 10}, {"steps": 7, "spacing": "trailing"}, {"sampler": "ddim", "eta": 0.5, "steps": 25}]
)
def test_a_table_with_a_start_is_the_end_of_the_whole_one(variance, sampling):
    if variance == "learned" and sampling.get("sampler") != "ddim":
        sampling = {}  # all steps
    whole = make_table(LINEAR, "eps", variance, **sampling)
    for at in {0, 1, len(whole) // 2, len(whole) - 1}:
        table = make_table(LINEAR, "eps", variance, start=int(whole.timesteps[at]), **sampling)
        np.testing.assert_array_equal(table.timesteps, whole.timesteps[at:])
        np.testing.assert_array_equal(table.coefficients, whole.coefficients[at:])
        assert (table.learned is None) == (whole.learned is None)
    np.testing.assert_array_equal(make_table(LINEAR, "eps", variance, start=np.int32(0)).timesteps, [0])


@pytest.mark.parametrize(("start", "nearest"), [(500, 555), (499, 444), (998, 999), (1, 0), (55, 0), (56, 111)])
def test_a_start_that_is_not_visited_begins_at_the_nearest_and_says_so(start, nearest):
    with pytest.warns(UserWarning, match=rf"start is {start}, which .* begins at {nearest}, the nearest"):
        table = make_table(LINEAR, "eps", "fixed_large", steps=10, start=start)
    assert table.rows.tobytes() == make_table(LINEAR, "eps", "fixed_large", steps=10, start=nearest).rows.tobytes()


@pytest.mark.filterwarnings("error")
def test_a_start_that_is_visited_begins_there_without_a_word():
    assert [make_table(LINEAR, "eps", "fixed_large", steps=10, start=t).timesteps[0] for t in (444, 0, 999)] == [
        444,
        0,
        999,
    ]


@pytest.mark.parametrize("start", [1000, -1, 2**70])
def test_a_start_outside_the_chain_is_refused(start):
    with pytest.raises(InputError, match=f"start must be from 0 to 999, not {start}"):
        make_table(LINEAR, "eps", "fixed_large", steps=10, start=start)


@pytest.mark.parametrize("start", [True, 444.0, "444", np.float64(444)])
def test_a_start_that_is_no_whole_number_is_refused(start):
    with pytest.raises(InputError, match="start must be"):
        make_table(LINEAR, "eps", "fixed_large", steps=10, start=start)


@pytest.mark.parametrize(
    "sampling",
    [
        {"sampler": "euler"},
        {"sampler": "ancestral", "eta": 0.5},
        {"sampler": "dpmpp_2m", "eta": 0.5},
        {"sampler": "unipc", "eta": 0.5},
        {"sampler": "ddim", "eta": -0.1},
        {"sampler": "ddim", "eta": 1.1},
        {"sampler": "ddim", "eta": float("nan")},
        {"steps": 0},
        {"steps": 1001},
        {"spacing": "log", "steps": 5},
    ],
)
def test_impossible_sampling_is_refused(sampling):
    with pytest.raises(InputError):
        make_table(LINEAR, "eps", "fixed_large", **sampling)


def test_unknown_variances_are_refused():
    with pytest.raises(SpecError, match="variance"):
        make_table(LINEAR, "eps", "learnt")
