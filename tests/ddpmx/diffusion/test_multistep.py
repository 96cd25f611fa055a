"""Multistep samplers: against the papers' own recurrences, diffusers, and an equation with an exact solution."""

from __future__ import annotations

from decimal import Decimal, localcontext

import numpy as np
import pytest

from ddpmx.diffusion.grids import timestep_grid
from ddpmx.diffusion.multistep import _right_hand_sides
from ddpmx.diffusion.samplers import PREDICTIONS, VARIANCES, make_table
from ddpmx.diffusion.schedule import SCHEDULES, make_schedule

SAMPLERS = ("dpmpp_2m", "unipc")
LINEAR = make_schedule("linear", 1000)
ALPHA_BAR = np.cumprod(1 - np.array([1e-4 + 0.0199 * t / 999 for t in range(1000)]))  # the paper's, written down again
FIXED = "fixed_small"


def walk(table, network, x, clip=np.inf):
    """x of each step in float64, and in the end x_0. ``network`` gives the output at (x, t)."""
    states, earlier = [x], [np.zeros_like(x)] * 2
    memory = np.zeros((len(table), 2)) if table.memory is None else table.memory
    for t, (p, q, a, b, sigma), (c, d) in zip(table.timesteps, table.rows, memory, strict=True):
        assert sigma == 0
        x0 = np.clip(p * x + q * network(x, t), -clip, clip)
        x = a * x0 + b * x + c * earlier[0] + d * earlier[1]
        earlier = [x0, earlier[0]]
        states.append(x)
    return states


def bumpy(x, t):
    """Some smooth ε that is not linear in x."""
    return np.sin(1.3 * x + t / 500) + 0.4 * x


# --- the papers ------------------------------------------------------------------------------------------------------


def of_the_papers(sampler, timesteps, x):
    """Algorithm 2 of Lu et al. 2022, or algorithms 5 and 6 of Zhao et al. 2023 with p = 2, both states kept, in the
    symbols of the latter: the corrector's system of equations is solved by NumPy, and e^h − 1 is written as such."""
    alpha, sigma = np.sqrt(ALPHA_BAR[timesteps]), np.sqrt(1 - ALPHA_BAR[timesteps])
    lam = np.log(alpha / sigma)
    states, m, corrected = [x], [], x
    for i, t in enumerate(timesteps):
        m.append((x - sigma[i] * bumpy(x, t)) / alpha[i])
        if i + 1 == len(timesteps):
            return [*states, m[i]]
        if sampler == "unipc" and i > 0:
            h = lam[i] - lam[i - 1]
            phi_1 = np.expm1(-h) / -h
            phi = [phi_1, (phi_1 - 1) / -h, ((phi_1 - 1) / -h - 1 / 2) / -h]
            order = min(i, 2)
            r = np.array([*((lam[i - 1 - k] - lam[i - 1]) / h for k in range(1, order)), 1.0])
            rho = np.array([0.5])  # of order 1, as both papers' authors simplify it
            if order == 2:
                vandermonde = np.stack([r**0, r**1])
                rho = np.linalg.solve(vandermonde, np.array([phi[1], 2 * phi[2]]) / phi_1)
            differences = [*((m[i - 1 - k] - m[i - 1]) / r[k - 1] for k in range(1, order)), m[i] - m[i - 1]]
            total = sum(weight * difference for weight, difference in zip(rho, differences, strict=True))
            corrected = sigma[i] / sigma[i - 1] * corrected - alpha[i] * np.expm1(-h) * (m[i - 1] + total)
        elif sampler == "dpmpp_2m":
            corrected = x
        h = lam[i + 1] - lam[i]
        guess = m[i]
        if i > 0:
            r = (lam[i] - lam[i - 1]) / h
            guess = (1 + 1 / (2 * r)) * m[i] - 1 / (2 * r) * m[i - 1]
        x = sigma[i + 1] / sigma[i] * corrected - alpha[i + 1] * np.expm1(-h) * guess
        states.append(x)
    raise AssertionError


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("steps", "spacing"), [(1, "logsnr"), (2, "karras"), (3, "linspace"), (8, "logsnr"),
                                                (12, "trailing"), (20, "karras"), (20, "quad")])  # fmt: skip
def test_the_table_is_the_papers_recurrence(sampler, steps, spacing):
    """UniPC's is that of predicted and corrected states: the table has got rid of the latter."""
    table = make_table(LINEAR, "eps", FIXED, sampler=sampler, steps=steps, spacing=spacing)
    x = np.random.default_rng(0).standard_normal(64)
    ours, theirs = walk(table, bumpy, x), of_the_papers(sampler, table.timesteps, x)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-9, atol=1e-9 * np.abs(other).max())


def test_the_corrector_makes_a_difference():
    """The control: the two samplers share their predictor, and the comparison above tells them apart."""
    x = np.random.default_rng(0).standard_normal(64)
    table = make_table(LINEAR, "eps", FIXED, sampler="unipc", steps=8, spacing="logsnr")
    assert np.abs(walk(table, bumpy, x)[-1] - of_the_papers("dpmpp_2m", table.timesteps, x)[-1]).max() > 1e-3


# --- diffusers -------------------------------------------------------------------------------------------------------


def of_diffusers(sampler, timesteps, x):
    """diffusers' scheduler at these timesteps, its tables replaced by float64."""
    diffusers = pytest.importorskip("diffusers", reason="not verified here: that diffusers takes the same steps")
    import torch

    settings = {"solver_order": 2, "prediction_type": "epsilon", "final_sigmas_type": "zero", "lower_order_final": True}
    if sampler == "dpmpp_2m":
        scheduler = diffusers.DPMSolverMultistepScheduler(1000, 1e-4, 0.02, algorithm_type="dpmsolver++", **settings)
    else:
        scheduler = diffusers.UniPCMultistepScheduler(1000, 1e-4, 0.02, solver_type="bh2", **settings)
    scheduler.set_timesteps(len(timesteps))
    scheduler.timesteps = torch.tensor(timesteps)
    scheduler.sigmas = torch.tensor([*np.sqrt(1 / ALPHA_BAR[timesteps] - 1), 0.0], dtype=torch.float64)
    states, x = [x], torch.tensor(x)[None, None]
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tensor(bumpy(x.numpy(), t.item())), t, x).prev_sample
        states.append(x.numpy().reshape(-1))
    return states


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("steps", "spacing"), [(8, "logsnr"), (10, "trailing"), (16, "karras"), (25, "logsnr")])
def test_diffusers_takes_the_same_steps(sampler, steps, spacing, figure):
    table = make_table(LINEAR, "eps", FIXED, sampler=sampler, steps=steps, spacing=spacing)
    x = np.random.default_rng(1).standard_normal(256)
    worst = 0.0
    for ours, theirs in zip(walk(table, bumpy, x), of_diffusers(sampler, table.timesteps, x), strict=True):
        worst = max(worst, np.abs(ours - theirs).max() / max(1, np.abs(theirs).max()))
    figure(f"{sampler}, {steps} steps, {spacing}: against diffusers, which rounds x to float32", worst, at_most=1e-5)


# --- the equation's exact solution -----------------------------------------------------------------------------------

LONG = make_schedule("linear", 100_000, {"beta_start": 1e-6, "beta_end": 2e-4})  # so that whole timesteps are even in λ
SPREAD = 0.5


def error(steps, spacing, **sampling):
    """Of x at t = 0, where x_0 ~ N(0, s²) and the probability-flow ODE keeps x_t/√(ᾱ_t·s² + 1 − ᾱ_t) as it is."""
    variance = LONG.alpha_bar * SPREAD**2 + LONG.one_minus_alpha_bar
    table = make_table(LONG, "eps", FIXED, steps=steps, spacing=spacing, **sampling)
    before_the_last = walk(table, lambda x, t: np.sqrt(LONG.one_minus_alpha_bar[t]) / variance[t] * x, 1.0)[-2]
    first, last = table.timesteps[0], table.timesteps[-1]
    return abs(before_the_last / np.sqrt(variance[last] / variance[first]) - 1)


@pytest.mark.parametrize("spacing", ["logsnr", "karras"])
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpmpp_2m", 2), ("unipc", 3)])
def test_the_error_falls_with_the_order(sampler, order, spacing, figure):
    """UniPC's corrector adds one to the order of its predictor (Zhao et al. 2023, theorem 3.1)."""
    errors = np.array([error(steps, spacing, sampler=sampler) for steps in (40, 80, 160)])
    measured = np.log2(errors[:-1] / errors[1:])
    figure(f"{sampler}, {spacing}: order of the error, apart from {order}", np.abs(measured - order).max(), at_most=0.2)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_few_steps_are_nearer_than_ddims(sampler):
    assert error(20, "logsnr", sampler=sampler) < error(80, "logsnr", sampler="ddim")


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "jsd"])
@pytest.mark.parametrize(("steps", "spacing"), [(9, "logsnr"), (7, "linspace"), (1000, "linspace")])
def test_a_perfect_output_keeps_the_marginals(sampler, name, steps, spacing):
    """x̂_0 = x_0 in every step: √ᾱ·x_0 + √(1−ᾱ)·ε leads to the same of the next timestep, exactly."""
    schedule = make_schedule(name, 1000)
    table = make_table(schedule, "v", FIXED, sampler=sampler, steps=steps, spacing=spacing)
    now = schedule.alpha_bar[table.timesteps]
    after = np.append(now[1:], 1.0)
    _, _, a, b, sigma = table.rows.T
    np.testing.assert_allclose(a + table.memory.sum(axis=1) + b * np.sqrt(now), np.sqrt(after), atol=1e-12)
    np.testing.assert_allclose(b**2 * (1 - now), 1 - after, atol=1e-12)
    assert not sigma.any()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_memory_is_used_when_there_is_some(sampler):
    memory = make_table(LINEAR, "eps", FIXED, sampler=sampler, steps=6, spacing="logsnr").memory
    assert (memory[:, 0] != 0).tolist() == [False, True, True, True, True, False]
    assert (memory[:, 1] != 0).tolist() == [False, False, *[sampler == "unipc"] * 3, False]


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_other_samplers_have_no_memory(sampler):
    table = make_table(LINEAR, "eps", FIXED, sampler=sampler, steps=6)
    assert table.memory is None
    assert table.coefficients.shape == (6, 5)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", ["logsnr", "trailing"])
def test_a_chain_that_starts_in_the_middle_remembers_nothing(sampler, spacing):
    """Its rows are those of a schedule that ends there, not those of the longer chain."""
    whole = make_table(LINEAR, "eps", FIXED, sampler=sampler, steps=12, spacing=spacing)
    for at in (0, 1, 5, 10, 11):
        part = make_table(LINEAR, "eps", FIXED, sampler=sampler, steps=12, spacing=spacing, start=whole.timesteps[at])
        np.testing.assert_array_equal(part.timesteps, whole.timesteps[at:])
        np.testing.assert_array_equal(part.rows[:, :2], whole.rows[at:, :2])
        assert not part.memory[0].any()
        assert not part.memory[:2, 1].any()
        x = np.random.default_rng(at).standard_normal(32)
        expected = of_the_papers(sampler, part.timesteps, x)[-1]
        np.testing.assert_allclose(walk(part, bumpy, x)[-1], expected, rtol=1e-9, atol=1e-9)
        later = 2 if sampler == "dpmpp_2m" else 3  # by then the memory is full
        np.testing.assert_array_equal(part.coefficients[later:], whole.coefficients[at + later :])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_what_is_predicted_makes_no_difference_to_the_steps(sampler, prediction):
    eps, other = (make_table(LINEAR, p, FIXED, sampler=sampler, steps=9) for p in ("eps", prediction))
    np.testing.assert_array_equal(other.coefficients[:, 2:], eps.coefficients[:, 2:])
    p, q = make_table(LINEAR, prediction, FIXED).rows[999 - other.timesteps, :2].T
    np.testing.assert_allclose(other.rows[:, :2].T, [p, q], rtol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("variance", VARIANCES)
def test_the_variance_makes_no_difference(sampler, variance):
    table = make_table(LINEAR, "eps", variance, sampler=sampler, steps=9)
    assert table.learned is None
    np.testing.assert_array_equal(
        table.coefficients, make_table(LINEAR, "eps", FIXED, sampler=sampler, steps=9).coefficients
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_chain_from_pure_noise_begins_with_first_order(sampler):
    """ᾱ = 0: λ is −∞ and the first step infinitely long, so the straight line through x̂_0 is level."""
    jsd = make_schedule("jsd", 1000)
    table = make_table(jsd, "v", FIXED, sampler=sampler, steps=10)
    assert table.timesteps[0] == 999
    song = make_table(jsd, "v", FIXED, sampler="ddim", steps=10)
    np.testing.assert_allclose(table.rows[0], song.rows[0], rtol=1e-14)
    assert table.memory[1, 0] == (0 if sampler == "dpmpp_2m" else -0.5 * table.rows[1, 3] * table.rows[0, 2])


# --- the numbers of the corrector ------------------------------------------------------------------------------------


def exact_right_hand_sides(h):
    with localcontext() as context:
        context.prec = 60
        h = Decimal(h)
        phi = 1 - (-h).exp()
        rest = 1 - phi / h
        return float(rest / phi), float((1 - 2 * rest / h) / phi)


def test_the_corrector_has_all_digits(figure):
    """At h = 1e-3, a step of T = 4000, the formula as it stands has seven."""
    h = np.concatenate([10.0 ** np.arange(-9, 0), np.linspace(0.3, 3, 28), [1 - 2.0**-53, 1, 10, 40, 700]])
    exact = np.array([exact_right_hand_sides(value) for value in h.tolist()]).T
    found = np.array(_right_hand_sides(h, -np.expm1(-h)))
    figure("b_1 and b_2 of UniPC against 60 digits, relative", np.abs(found / exact - 1).max(), at_most=1e-14)
    rest = 1 + np.expm1(-h) / h
    plain = (1 - 2 * rest / h) / -np.expm1(-h)
    assert abs(plain / exact[1] - 1)[h < 0.01].max() > 1e-9  # the control
    np.testing.assert_array_equal(_right_hand_sides(np.array([np.inf]), np.array([1.0])), [[1.0], [1.0]])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_grids_of_a_schedule_are_taken(sampler):
    for spacing in ("logsnr", "karras"):
        table = make_table(LINEAR, "eps", FIXED, sampler=sampler, steps=10, spacing=spacing)
        level = np.log(np.sqrt(ALPHA_BAR / (1 - ALPHA_BAR)))
        grid = timestep_grid(1000, 10, spacing, log_snr=lambda level=level: level)
        np.testing.assert_array_equal(table.timesteps[::-1], grid)
