"""The chain: its update against float64, its distribution against the closed form, its samples against diffusers."""

from __future__ import annotations

import numpy as np
import pytest

import ddpmx
from ddpmx.diffusion import noise
from ddpmx.diffusion.noise import Purpose
from ddpmx.diffusion.samplers import make_table
from ddpmx.diffusion.schedule import make_schedule
from ddpmx.errors import NumericError
from ddpmx.sampling import chain
from ddpmx.sampling.pixels import to_nhwc
from oracles import gaussian
from oracles.toy_backend import ToyBackend

T = 1000
BETA = np.array([1e-4 + 0.0199 * t / 999 for t in range(T)])
ALPHA_BAR = np.cumprod(1 - BETA)
VARIANCES = ("fixed_small", "fixed_large")


# --- the update ------------------------------------------------------------------------------------------------------


def ho(t, x, eps, z, variance):
    """One step of the paper in float64: x̂_0 of equation 15, clipped, then the mean and the variance of equation 7."""
    before = ALPHA_BAR[t - 1] if t else 1.0
    x0 = np.clip((x - np.sqrt(1 - ALPHA_BAR[t]) * eps) / np.sqrt(ALPHA_BAR[t]), -1, 1)
    mean = (np.sqrt(before) * BETA[t] * x0 + np.sqrt(1 - BETA[t]) * (1 - before) * x) / (1 - ALPHA_BAR[t])
    if t == 0:
        return x0, mean
    square = BETA[t] * (1 - before) / (1 - ALPHA_BAR[t]) if variance == "fixed_small" else BETA[t]
    return x0, mean + np.sqrt(square) * z


@pytest.mark.parametrize("variance", VARIANCES)
def test_one_step_against_float64(variance, figure):
    rng = np.random.default_rng(0)
    table = make_table(make_schedule("linear", T), "eps", variance)
    worst = 0.0
    for t, row in zip(table.timesteps.tolist(), table.rows.astype(np.float32), strict=True):
        x, eps, z = rng.standard_normal((3, 256)).astype(np.float32)
        # half of the outputs are those of a good network, so that x̂_0 is not always clipped
        clean = rng.uniform(-1, 1, 128)
        x[:128] = np.sqrt(ALPHA_BAR[t]) * clean + np.sqrt(1 - ALPHA_BAR[t]) * eps[:128]
        x0, x_next = np.empty_like(x), np.empty_like(x)
        chain.update(row, 1.0, x, eps, z if row[4] else None, x0=x0, x_next=x_next)
        _, expected = ho(t, x.astype(np.float64), eps.astype(np.float64), z.astype(np.float64), variance)
        worst = max(worst, np.abs(x_next - expected).max() / max(1.0, np.abs(expected).max()))
        assert np.abs(x0).max() <= 1
    figure(f"one step against float64, {variance}, relative to the largest value", worst, at_most=2e-6)


def test_without_clipping_x0_is_free():
    row = np.float32([2, 0, 1, 0, 0])
    x = np.float32([-3, 0.25, 3])
    x0, x_next = np.empty_like(x), np.empty_like(x)
    chain.update(row, np.inf, x, x, None, x0=x0, x_next=x_next)
    assert x0.tolist() == [-6, 0.5, 6]
    chain.update(row, 1.5, x, x, None, x0=x0, x_next=x_next)
    assert x0.tolist() == [-1.5, 0.5, 1.5]
    assert x_next.tolist() == [-1.5, 0.5, 1.5]


def test_nan_is_not_clipped_away():
    x = np.float32([np.nan])
    x0, x_next = np.empty_like(x), np.empty_like(x)
    chain.update(np.float32([1, 0, 1, 0, 0]), 1.0, x, np.zeros_like(x), None, x0=x0, x_next=x_next)
    assert np.isnan(x0[0])
    assert np.isnan(x_next[0])


# --- the loop --------------------------------------------------------------------------------------------------------


def walk(backend, table, n=2, seed=3, clip=1.0):
    indices = np.arange(n)
    start = chain.initial(seed, indices, gaussian.SHAPE)
    return chain.run(backend, table, start, seed=seed, images=indices, clip=clip)


def toy_table(**sampling):
    return make_table(gaussian.SPEC.make_schedule(), "eps", "fixed_large", **sampling)


def test_the_chain_starts_from_the_initial_noise_and_continues_from_the_last_step():
    backend, state = ToyBackend(), None
    for step in walk(backend, toy_table(steps=6)):
        expected = chain.initial(3, np.arange(2), gaussian.SHAPE) if state is None else state
        np.testing.assert_array_equal(step.x, expected)
        state = step.x_next.copy()
    assert [t for t, _ in backend.calls] == [999, 799, 599, 400, 200, 0]
    np.testing.assert_array_equal(state, step.x0)


def test_initial_noise_has_its_own_purpose():
    x = chain.initial(9, np.array([4]), (3, 8, 8))
    np.testing.assert_array_equal(x.ravel(), noise.normal(9, [4], 0, Purpose.INITIAL, 192)[0])


def test_noise_is_a_function_of_the_timestep_and_the_image():
    """What a step adds to its mean is σ·z(seed, image, t), whatever the number of steps."""
    table = toy_table(steps=4)
    for index, step in enumerate(walk(ToyBackend(), table)):
        a, b, sigma = table.rows[index, 2:]
        z = noise.normal(3, [0, 1], step.t, Purpose.STEP, 192).reshape(step.x.shape)
        np.testing.assert_allclose(step.x_next, a * step.x0 + b * step.x + sigma * z, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("at", "number"), [(999, 1), (400, 4), (0, 6)])
def test_an_output_that_is_not_finite_is_named_with_its_step(value, at, number):
    backend = ToyBackend(poison=(at, value))
    with pytest.raises(NumericError, match=f"t = {at} ") as caught:
        list(walk(backend, toy_table(steps=6)))
    assert f"step {number} of 6" in str(caught.value)
    assert backend.calls[-1][0] == at  # and nothing after it


def test_the_next_step_is_computed_on_demand_only():
    backend = ToyBackend()
    steps = walk(backend, toy_table(steps=6))
    next(steps)
    next(steps)
    steps.close()
    assert len(backend.calls) == 2


@pytest.mark.parametrize(
    ("sways", "n", "batch", "executed"),
    [
        (None, 3, 4, 3),  # run just these
        (None, 4, 4, 4),
        ("size", 3, 4, 4),  # fill up
        ("size", 4, 4, 4),
        ("place", 3, 4, 1),  # one by one
        ("place", 4, 4, 1),
        ("size", 1, 1, 1),
        ("place", 1, 1, 1),
        ("place", 1, 2, 1),
    ],
)
def test_the_executed_batch_is_found_by_measuring(sways, n, batch, executed):
    assert chain.executed_batch(ToyBackend(sways=sways), gaussian.SPEC, n, batch) == executed


# --- the closed form -------------------------------------------------------------------------------------------------


def exact(table):
    """The toy's ε is linear in x, so a chain is too: (slope, variance) with x_end = slope·μ + N(0, variance)."""
    slope_t, offset_t = gaussian.coefficients(gaussian.SPEC.make_schedule())
    slope, variance = 0.0, 1.0
    for t, (p, q, a, b, sigma) in zip(table.timesteps.tolist(), table.rows, strict=True):
        keeps = a * (p + q * slope_t[t]) + b
        slope = keeps * slope - a * q * offset_t[t]
        variance = keeps**2 * variance + sigma**2
    return slope, variance


def standard_errors(x, slope, variance):
    """How far mean, slope along μ and variance of the sample lie from the exact ones, the largest of the three."""
    rest = x.astype(np.float64) - slope * gaussian.MU
    n, deviation = rest.size, np.sqrt(variance)
    mean = abs(rest.mean()) / (deviation / n**0.5)
    along = abs((rest * gaussian.MU).sum()) / (deviation * ((gaussian.MU**2).sum() * len(x)) ** 0.5)
    spread = abs((rest**2).mean() / variance - 1) / (2 / n) ** 0.5
    return max(mean, along, spread)


CHAINS = {
    "ancestral, fixed_small": {"variance": "fixed_small"},
    "ancestral, fixed_large": {"variance": "fixed_large"},
    "ancestral, fixed_large, 100 steps": {"variance": "fixed_large", "steps": 100},
    "ancestral, fixed_small, 50 steps trailing": {"variance": "fixed_small", "steps": 50, "spacing": "trailing"},
    "ddim, η = 0": {"sampler": "ddim"},
    "ddim, η = 0.5, 100 steps": {"sampler": "ddim", "eta": 0.5, "steps": 100},
    "ddim, η = 1, 50 steps": {"sampler": "ddim", "eta": 1.0, "steps": 50},
    "ddim, η = 0, 50 steps leading": {"sampler": "ddim", "steps": 50, "spacing": "leading"},
    "ddim, η = 1": {"sampler": "ddim", "eta": 1.0},
}


def samples(pipeline, n=64, seed=20, **sampling):
    """x̂_0 of the last step: float32, before it is rounded to pixels."""
    return list(pipeline.stream(n, seed=seed, **sampling))[-1].x0


@pytest.fixture(scope="module")
def toy(gaussian_onnx):
    pytest.importorskip("onnxruntime", reason="not verified here: the distribution of whole chains (no onnxruntime)")
    with ddpmx.load(gaussian_onnx, threads=1) as pipeline:
        yield pipeline


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_whole_chains_have_the_exact_mean_and_variance(toy, name, figure):
    sampling = CHAINS[name]
    slope, variance = exact(toy.table(**sampling))
    x = samples(toy, **sampling)
    figure(f"{name}: mean and variance, in standard errors", standard_errors(x, slope, variance), at_most=4)
    if "steps" not in sampling and sampling.get("sampler") != "ddim":
        # many small steps end at the data's own distribution
        figure(f"{name}: slope along μ against 1", abs(slope - 1), at_most=0.02)
        deviation = np.sqrt(np.mean((x - gaussian.MU) ** 2))
        figure(f"{name}: deviation against s, relative", abs(deviation / gaussian.S - 1), at_most=0.06)


def test_the_statistics_would_notice_another_variance(toy):
    """The control: the two variances differ only in the last steps, and a tenth of them is enough to be seen."""
    small, large = (exact(toy.table(variance=variance, steps=100)) for variance in VARIANCES)
    x = samples(toy, variance="fixed_large", steps=100)
    assert standard_errors(x, *large) < 4 < standard_errors(x, *small)
    assert standard_errors(x + np.float32(0.01), *large) > 4
    assert standard_errors(x + np.float32(0.02 * gaussian.MU), *large) > 4


def test_a_chain_without_noise_is_the_linear_map_of_its_start(toy, figure):
    """η = 0: every number can be compared, not only their distribution."""
    table = toy.table(sampler="ddim", steps=50)
    slope_t, offset_t = gaussian.coefficients(gaussian.SPEC.make_schedule())
    x = chain.initial(20, np.arange(8), gaussian.SHAPE).astype(np.float64)
    for t, (p, q, a, b, _) in zip(table.timesteps.tolist(), table.rows, strict=True):
        eps = slope_t[t] * x - offset_t[t] * gaussian.MU
        x = a * (p * x + q * eps) + b * x
    drawn = samples(toy, n=8, sampler="ddim", steps=50)
    figure("50 steps of ddim against float64, absolute", np.abs(drawn - x).max(), at_most=1e-4)


# --- against diffusers -----------------------------------------------------------------------------------------------


def hugging_face(monkeypatch, variance, drawn):
    """diffusers' own scheduler; ``drawn`` replaces the noise that it would draw."""
    reason = "not verified here: that diffusers takes the same steps (no diffusers)"
    pytest.importorskip("diffusers", reason=reason)
    import torch
    from diffusers.schedulers import scheduling_ddpm

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: torch.from_numpy(drawn()))
    return torch, scheduling_ddpm.DDPMScheduler(
        T, 1e-4, 0.02, "linear", variance_type=variance, clip_sample=True, prediction_type="epsilon"
    )


@pytest.mark.torch
@pytest.mark.parametrize("variance", VARIANCES)
def test_diffusers_takes_the_same_steps(variance, figure, monkeypatch):
    current = {}
    torch, scheduler = hugging_face(monkeypatch, variance, lambda: current["z"])
    rng = np.random.default_rng(1)
    table = make_table(make_schedule("linear", T), "eps", variance)
    worst = 0.0
    for t, row in zip(table.timesteps.tolist(), table.rows.astype(np.float32), strict=True):
        x, eps, current["z"] = rng.standard_normal((3, 2, 3, 4, 4)).astype(np.float32)
        x[0] = np.sqrt(ALPHA_BAR[t]) * rng.uniform(-1, 1, x[0].shape) + np.sqrt(1 - ALPHA_BAR[t]) * eps[0]
        x0, x_next = np.empty_like(x), np.empty_like(x)
        chain.update(row, 1.0, x, eps, current["z"] if row[4] else None, x0=x0, x_next=x_next)
        theirs = scheduler.step(torch.from_numpy(eps), t, torch.from_numpy(x)).prev_sample.numpy()
        worst = max(worst, np.abs(x_next - theirs).max())
    figure(f"one step against diffusers, {variance}, the worst of all t", worst, at_most=2e-4)


@pytest.mark.torch
@pytest.mark.parametrize("variance", VARIANCES)
def test_diffusers_draws_the_same_images(variance, toy, gaussian_onnx, figure, monkeypatch):
    """Both run all 1000 steps on their own, with one network and one noise. diffusers' tables are float32."""
    from ddpmx.backends.base import Buffers
    from ddpmx.backends.ort import OrtBackend

    n, seed, state = 16, 6, {}
    indices = np.arange(n)
    torch, scheduler = hugging_face(monkeypatch, variance, lambda: state["z"])
    backend, buffers = OrtBackend(gaussian_onnx, "eps", threads=1), Buffers.of(n, gaussian.SHAPE)
    backend.bind(buffers)
    buffers.x[...] = chain.initial(seed, indices, gaussian.SHAPE)
    for t in range(T - 1, -1, -1):
        buffers.t.fill(t)
        backend.enqueue()
        state["z"] = noise.normal(seed, indices, t, Purpose.STEP, 192).reshape(buffers.x.shape)
        step = scheduler.step(torch.from_numpy(buffers.out), t, torch.from_numpy(buffers.x))
        buffers.x[...] = step.prev_sample.numpy()
    theirs = to_nhwc(buffers.x).astype(int)
    ours = toy.generate(n, seed=seed, variance=variance).astype(int)
    figure(f"1000 steps against diffusers, {variance}: equal levels", (ours == theirs).mean(), at_least=0.995)
    figure(f"1000 steps against diffusers, {variance}: levels apart", np.abs(ours - theirs).max(), at_most=1)
