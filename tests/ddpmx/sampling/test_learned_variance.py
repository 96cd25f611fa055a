"""A learned variance: its exponential against float64, its steps against the paper and diffusers.

cuda/test_step_c.py and cuda/test_kernels.py test that C and the GPU's kernels compute the same bits.
"""

from __future__ import annotations

import numpy as np
import pytest

from ddpmx.backends.base import Buffers
from ddpmx.diffusion.samplers import FIXED_VARIANCES, Table, make_table
from ddpmx.diffusion.schedule import make_schedule
from ddpmx.errors import InputError, NumericError
from ddpmx.parity.ladder import run_ladder
from ddpmx.sampling import chain
from ddpmx.sampling.request import Sampling
from oracles import gaussian
from oracles.toy_backend import ToyBackend

T = 1000
BETA = np.array([1e-4 + 0.0199 * t / 999 for t in range(T)])
ALPHA_BAR = np.cumprod(1 - BETA)
LINEAR = make_schedule("linear", T)


# --- the exponential -------------------------------------------------------------------------------------------------


def ulps(x):
    """The largest error of exp(x) against float64, in units of the last place of the right float32."""
    exact = np.exp(x.astype(np.float64))
    return np.max(np.abs(chain.exp(x) - exact) / np.spacing(exact.astype(np.float32)).astype(np.float64))


@pytest.mark.parametrize(("low", "high"), [(-30, 3), (-1, 1), (-87, 88)])
def test_the_exponential_is_within_one_unit_of_the_last_place(low, high, figure):
    figure(f"exp on [{low}, {high}], ulp", ulps(np.linspace(low, high, 2**21 + 1, dtype=np.float32)), at_most=1.0)


def test_the_measure_notices_another_exponential():
    """The control: NumPy's exponential of a neighbouring x."""
    x = np.linspace(-30, 3, 1001, dtype=np.float32)
    right = np.exp(x.astype(np.float64))
    beside = np.exp(np.nextafter(x, np.float32(9)).astype(np.float64))
    assert np.max(np.abs(beside - right) / np.spacing(right.astype(np.float32))) > 4


def test_the_exponential_of_zero_is_one():
    np.testing.assert_array_equal(chain.exp(np.float32([0.0, -0.0, 1e-45, -1e-45, 1e-9])), np.ones(5, np.float32))


def test_the_exponential_is_a_normal_number_whatever_x_is():
    x = np.float32([-np.inf, -3.4e38, -1e4, -100, -87.4, -87, 88, 88.1, 100, 3.4e38, np.inf])
    y = chain.exp(x)
    assert np.isfinite(y).all()
    assert y.min() >= np.finfo(np.float32).tiny
    np.testing.assert_array_equal(y[:6], y[5])
    np.testing.assert_array_equal(y[6:], y[6])
    np.testing.assert_allclose(y[5:7], np.exp([-87.0, 88.0]), rtol=1e-6)


def test_the_exponential_hardly_ever_falls():
    """Two pieces of it join in the middle between two powers of 2, to within an ulp."""
    y = chain.exp(np.linspace(-30, 3, 2**20, dtype=np.float32)).astype(np.float64)
    assert np.max((y[:-1] - y[1:]) / np.spacing(y[:-1].astype(np.float32))) <= 1


# --- one step --------------------------------------------------------------------------------------------------------


def paper(t, previous, x, eps, v, z):
    """Nichol & Dhariwal in float64: the mean of Ho et al., and log σ² between log β̃ and log β (equation 15)."""
    before = ALPHA_BAR[previous] if previous >= 0 else 1.0
    now, beta = ALPHA_BAR[t], 1 - ALPHA_BAR[t] / before
    x0 = np.clip((x - np.sqrt(1 - now) * eps) / np.sqrt(now), -1, 1)
    mean = (np.sqrt(before) * beta * x0 + np.sqrt(1 - beta) * (1 - before) * x) / (1 - now)
    if previous < 0:
        return mean
    share = (v + 1) / 2
    log_variance = share * np.log(beta) + (1 - share) * np.log(beta * (1 - before) / (1 - now))
    return mean + np.exp(log_variance / 2) * z


def one_step(table, index, x, eps, v, z):
    row, learned = table.rows[index].astype(np.float32), table.learned[index].astype(np.float32)
    x0, x_next = np.empty_like(x), np.empty_like(x)
    noisy = row[4] != 0
    sigma = chain.learned_sigma(learned, v) if noisy else None
    chain.update(row, 1.0, x, eps, z if noisy else None, x0=x0, x_next=x_next, sigma=sigma)
    return x_next


def previous_of(table):
    return [*table.timesteps[1:].tolist(), -1]


@pytest.mark.parametrize("steps", [T, 50, 7])
def test_one_step_against_float64(steps, figure):
    rng = np.random.default_rng(0)
    table = make_table(LINEAR, "eps", "learned_range", steps=steps)
    worst = 0.0
    for index, (t, previous) in enumerate(zip(table.timesteps.tolist(), previous_of(table), strict=True)):
        x, eps, z = rng.standard_normal((3, 256)).astype(np.float32)
        v = rng.uniform(-1.5, 1.5, 256).astype(np.float32)
        x[:128] = np.sqrt(ALPHA_BAR[t]) * rng.uniform(-1, 1, 128) + np.sqrt(1 - ALPHA_BAR[t]) * eps[:128]
        expected = paper(t, previous, *(a.astype(np.float64) for a in (x, eps, v, z)))
        x_next = one_step(table, index, x, eps, v, z)
        worst = max(worst, np.abs(x_next - expected).max() / max(1.0, np.abs(expected).max()))
    figure(f"one learned step of {steps} against float64, relative to the largest value", worst, at_most=2e-6)


def test_at_its_ends_the_learned_variance_is_the_fixed_one(figure):
    fixed = [make_table(LINEAR, "eps", variance).rows[:-1, 4] for variance in FIXED_VARIANCES]
    learned = make_table(LINEAR, "eps", "learned_range").learned[:-1].astype(np.float32)
    for sigma, v, name in zip(fixed, (-1, 1), FIXED_VARIANCES, strict=True):
        ours = np.array([chain.learned_sigma(row, np.float32([v]))[0] for row in learned])
        figure(f"σ at v = {v} against {name}, relative", np.abs(ours / sigma - 1).max(), at_most=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("steps", [T, 40, 3])
def test_diffusers_takes_the_same_steps(steps, figure, monkeypatch):
    """Over the same timesteps, with the same noise. Its tables are float32, and lose digits in differences."""
    reason = "not verified here: that diffusers takes the same steps with a learned variance (no diffusers)"
    pytest.importorskip("diffusers", reason=reason)
    import torch
    from diffusers.schedulers import scheduling_ddpm

    current = {}
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: torch.from_numpy(current["z"]))
    scheduler = scheduling_ddpm.DDPMScheduler(
        T, 1e-4, 0.02, "linear", variance_type="learned_range", clip_sample=True, prediction_type="epsilon"
    )
    table = make_table(LINEAR, "eps", "learned_range", steps=steps)
    scheduler.set_timesteps(timesteps=table.timesteps.tolist())
    rng = np.random.default_rng(1)
    worst = apart = 0.0
    for index, t in enumerate(table.timesteps.tolist()):
        x, eps, current["z"] = rng.standard_normal((3, 2, 3, 4, 4)).astype(np.float32)
        v = rng.uniform(-1.2, 1.2, x.shape).astype(np.float32)
        x[0] = np.sqrt(ALPHA_BAR[t]) * rng.uniform(-1, 1, x[0].shape) + np.sqrt(1 - ALPHA_BAR[t]) * eps[0]
        output = torch.from_numpy(np.concatenate([eps, v], axis=1))  # diffusers takes both outputs in one array
        theirs = scheduler.step(output, t, torch.from_numpy(x)).prev_sample.numpy()
        worst = max(worst, np.abs(one_step(table, index, x, eps, v, current["z"]) - theirs).max())
        if index + 1 < steps:
            apart = max(apart, np.abs(one_step(table, index, x, eps, -v, current["z"]) - theirs).max())
    figure(f"one learned step of {steps} against diffusers, the worst of all t", worst, at_most=2e-4)
    assert apart > 10 * worst  # the control: with −v


# --- the chain -------------------------------------------------------------------------------------------------------


def toy_table(variance="learned_range", **sampling):
    return make_table(gaussian.SPEC.make_schedule(), "eps", variance, **sampling)


def walk(backend, table, n=2, seed=3):
    indices = np.arange(n)
    return chain.run(backend, table, chain.initial(seed, indices, gaussian.SHAPE), seed=seed, images=indices)


def with_fixed_sigma(table, v):
    """The table with the σ of a network whose var is v everywhere."""
    rows = table.rows.copy()
    rows[:, 4] *= np.exp(table.learned @ [1, v])
    return Table(table.timesteps, rows)


@pytest.mark.parametrize("v", [-1.0, 0.3, 2.0])
@pytest.mark.parametrize("steps", [100, 5])
def test_a_chain_has_the_variance_of_the_network_s_output(v, steps, figure):
    table = toy_table(steps=steps)
    *_, learned = walk(ToyBackend(v=v), table)
    *_, fixed = walk(ToyBackend(), with_fixed_sigma(table, v))
    figure(f"{steps} steps, v = {v}, against a fixed σ", np.abs(learned.x_next - fixed.x_next).max(), at_most=2e-5)
    *_, other = walk(ToyBackend(v=v + 0.01), table)
    assert np.abs(learned.x_next - other.x_next).max() > 2e-5  # the control


@pytest.mark.parametrize("log_variance", [-9.0, -4.0])
def test_a_chain_takes_a_learned_log_variance_as_it_is(log_variance, figure):
    """Every step adds noise of σ² = exp(var)."""
    table = toy_table("learned", start=40)
    rows = table.rows.copy()
    rows[:, 4] *= np.exp(log_variance / 2)
    *_, learned = walk(ToyBackend(v=log_variance), table)
    *_, fixed = walk(ToyBackend(), Table(table.timesteps, rows))
    figure(f"var = {log_variance} against a fixed σ", np.abs(learned.x_next - fixed.x_next).max(), at_most=2e-5)
    *_, other = walk(ToyBackend(v=log_variance + 0.02), table)
    assert np.abs(learned.x_next - other.x_next).max() > 2e-5  # the control


def test_a_request_for_another_learned_variance_is_refused():
    fixed, ranged, log = (gaussian.SPEC.replace(variance=v) for v in ("fixed_large", "learned_range", "learned"))
    for spec, wanted, fact in (
        (fixed, "learned", "has no variance output"),
        (fixed, "learned_range", "has no variance output"),
        (ranged, "learned", "means something else"),
        (log, "learned_range", "means something else"),
    ):
        with pytest.raises(InputError, match=fact):
            Sampling(variance=wanted).table(spec)
    assert log.outputs == ("eps", "var")
    assert Sampling(variance="learned").table(log).learned is not None
    assert Sampling(variance="fixed_small", steps=10).table(log).learned is None
    with pytest.raises(InputError, match="variance of single steps"):
        Sampling(steps=10).table(log)


def test_every_element_has_its_own_variance():
    class Halves(ToyBackend):
        def enqueue(self):
            super().enqueue()
            self.buffers.var[..., :4] = -1

    table = toy_table(steps=6)
    mixed, small, large = (next(walk(backend, table)) for backend in (Halves(v=1), ToyBackend(v=-1), ToyBackend(v=1)))
    np.testing.assert_array_equal(mixed.x_next[..., :4], small.x_next[..., :4])
    np.testing.assert_array_equal(mixed.x_next[..., 4:], large.x_next[..., 4:])
    assert not np.array_equal(small.x_next, large.x_next)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("at", "number"), [(999, 1), (400, 4), (0, 6)])
def test_a_variance_that_is_not_finite_is_named_with_its_step(value, at, number):
    backend = ToyBackend(poison=(at, value), poisoned="var")
    with pytest.raises(NumericError, match=f"t = {at} ") as caught:
        list(walk(backend, toy_table(steps=6)))
    assert f"step {number} of 6" in str(caught.value)
    assert backend.calls[-1][0] == at


def test_a_fixed_variance_does_not_read_the_output_var():
    """Not even of a network that has one."""
    for table in (toy_table("fixed_large", steps=6), toy_table(sampler="ddim", eta=1.0, steps=6)):
        backend = ToyBackend(poison=(400, np.nan), poisoned="var")
        assert len(list(walk(backend, table))) == 6
        assert backend.buffers.var is None


@pytest.mark.parametrize(("sways", "executed"), [(None, 3), ("size", 4), ("place", 1)])
def test_the_executed_batch_depends_on_the_output_var(sways, executed):
    backend = ToyBackend(sways=sways, swaying="var")
    learns = gaussian.SPEC.replace(variance="learned_range")
    assert chain.executed_batch(backend, learns, 3, 4) == executed
    assert chain.executed_batch(backend, gaussian.SPEC, 3, 4) == 3


def test_an_image_alone_has_the_variance_of_its_own_row():
    buffers = Buffers.of(3, (1, 2, 2), var=True)
    buffers.var[...] = np.arange(3)[:, None, None, None]
    assert np.all(buffers.rows(slice(2, 3)).var == 2)


def test_parity_checks_the_output_var():
    """Without a record: neighbours make no difference. With one: see ddpm_export/proof/test_record_conditioning.py."""
    learns = gaussian.SPEC.replace(variance="learned_range")
    assert run_ladder(ToyBackend(), learns, None, batch=2).passed
    assert not run_ladder(ToyBackend(sways="place", swaying="var"), learns, None, batch=2).passed
    assert run_ladder(ToyBackend(sways="place", swaying="var"), gaussian.SPEC, None, batch=2).passed
    with pytest.raises(NumericError, match="not finite"):
        run_ladder(ToyBackend(poison=(0, np.nan), poisoned="var"), learns, None, batch=2)
