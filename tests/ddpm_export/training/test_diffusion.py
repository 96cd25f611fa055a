"""The forward process and the objective, against the paper's formulas in float64 and against the runtime's tables."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: the training objective (no torch)")

import torch

from ddpm_export.training.diffusion import GaussianDiffusion
from ddpmx.diffusion.samplers import FIXED_VARIANCES, PREDICTIONS, make_table
from ddpmx.diffusion.schedule import make_schedule

pytestmark = pytest.mark.torch

T = 1000
SHAPE = (2, 3, 4)  # C, H, W
BETA = np.linspace(1e-4, 0.02, T)
ALPHA_BAR = np.cumprod(1 - BETA)  # the paper's schedule, written down again


@pytest.fixture(scope="module")
def schedule():
    return make_schedule("linear", T)


@pytest.fixture(params=PREDICTIONS)
def diffusion(request, schedule):
    return GaussianDiffusion(schedule, request.param)


def draw(n: int, *, seed: int = 0):
    """x_0 in [−1, 1] and ε ~ N(0, I), float32 [n, C, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(n, *SHAPE, generator=generator) - 1, torch.randn(n, *SHAPE, generator=generator)


def column(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, 1, 1, 1)


def exact_output(prediction: str, x0, eps, t) -> np.ndarray:
    """The output of a perfect network, in float64."""
    a = column(ALPHA_BAR[t.numpy()])
    x0, eps = x0.double().numpy(), eps.double().numpy()
    beta, before = column(BETA[t.numpy()]), column(np.concatenate([[1.0], ALPHA_BAR])[t.numpy()])
    x_t = np.sqrt(a) * x0 + np.sqrt(1 - a) * eps
    mean = (np.sqrt(before) * beta * x0 + np.sqrt(1 - beta) * (1 - before) * x_t) / (1 - a)  # equation 7
    return {"eps": eps, "x0": x0, "v": np.sqrt(a) * eps - np.sqrt(1 - a) * x0, "mu": mean}[prediction]


# --- q(x_t | x_0) ----------------------------------------------------------------------------------------------------


def test_q_sample_is_equation_4_at_all_t(schedule, figure):
    x0, eps = draw(T)
    a = column(ALPHA_BAR)
    wanted = np.sqrt(a) * x0.double().numpy() + np.sqrt(1 - a) * eps.double().numpy()
    x_t = GaussianDiffusion(schedule).q_sample(x0, torch.arange(T), eps)
    assert x_t.dtype == torch.float32
    figure("q_sample against float64, all t: max |Δ|", np.abs(x_t.numpy() - wanted).max(), at_most=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_q_sample_is_float32_whatever_it_is_given(schedule, dtype):
    diffusion, t = GaussianDiffusion(schedule), torch.arange(T)
    x0, eps = (values.to(dtype) for values in draw(T))
    assert torch.equal(diffusion.q_sample(x0, t, eps), diffusion.q_sample(x0.float(), t, eps.float()))


def test_q_sample_is_float32_inside_autocast(schedule):
    diffusion, t = GaussianDiffusion(schedule), torch.arange(T)
    x0, eps = draw(T)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype == torch.bfloat16, "autocast is at work"
        inside = diffusion.q_sample(x0, t, eps)
    assert torch.equal(inside, diffusion.q_sample(x0, t, eps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_first_timesteps_get_their_noise(schedule, dtype):
    t = torch.arange(10)
    zeros, ones = torch.zeros(10, *SHAPE, dtype=dtype), torch.ones(10, *SHAPE, dtype=dtype)
    noise = GaussianDiffusion(schedule).q_sample(zeros, t, ones)[:, 0, 0, 0]
    assert np.allclose(noise.numpy(), np.sqrt(1 - ALPHA_BAR[:10]), rtol=1e-5)


def test_in_bfloat16_the_first_ten_timesteps_would_get_none():
    """What the test above is for: ᾱ rounded first, then 1 − ᾱ, as is often written."""
    alpha_bar = torch.from_numpy(ALPHA_BAR).to(torch.bfloat16)
    noise = (1 - alpha_bar).sqrt()
    assert not noise[:10].any()
    assert noise[10:].all()


# --- p(x_{t−1} | x_t) ------------------------------------------------------------------------------------------------


def test_the_exact_output_leads_back_to_the_image(diffusion):
    x0, eps = draw(T)
    t = torch.arange(T)
    out = torch.from_numpy(exact_output(diffusion.prediction, x0, eps, t)).float()
    found = diffusion.predict_x0(diffusion.q_sample(x0, t, eps), t, out, clip=None)
    error = (found - x0).abs().amax((1, 2, 3)).numpy()
    # an ε-network's rounding is multiplied by 1/√ᾱ, 157 at the last t, that of μ̃ by the inverse of x_0's share in it
    share = BETA * np.sqrt(np.concatenate([[1.0], ALPHA_BAR[:-1]])) / (1 - ALPHA_BAR)
    gain = {"eps": 1 / np.sqrt(ALPHA_BAR), "mu": 1 / share}.get(diffusion.prediction, 1.0)
    assert np.all(error < 1.5e-6 * gain)


def test_clipping_bounds_the_image(schedule):
    diffusion, t = GaussianDiffusion(schedule), torch.tensor([999])
    x = torch.full((1, *SHAPE), 3.0)
    zeros = torch.zeros_like(x)
    assert diffusion.predict_x0(x, t, zeros, clip=None).min() > 400
    assert torch.equal(diffusion.predict_x0(x, t, zeros), torch.ones_like(x))
    assert torch.equal(diffusion.predict_x0(-x, t, zeros, clip=0.5), torch.full_like(x, -0.5))


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("variance", FIXED_VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_mean_and_variance_are_those_of_the_runtime(schedule, prediction, variance, clip):
    """One reverse step by the training side, and by the table that the chain runs: the same numbers."""
    x, out = draw(T, seed=1)
    mean, log_variance = GaussianDiffusion(schedule, prediction, variance).p_mean_log_variance(
        x, torch.arange(T), out, clip=clip
    )
    table = make_table(schedule, prediction, variance)
    order = np.argsort(table.timesteps)
    p, q, a, b, sigma = (column(values) for values in table.rows[order].T)
    x, out = x.double().numpy(), out.double().numpy()
    x0 = p * x + q * out
    scale = 1 + np.abs(p * x) + np.abs(q * out)  # before clipping x̂_0 reaches 400, and float32 rounds accordingly
    x0 = x0 if clip is None else np.clip(x0, -clip, clip)
    assert np.all(np.abs(mean.numpy() - (a * x0 + b * x)) < 1e-6 * scale)
    assert log_variance.shape == (T, 1, 1, 1)
    found = log_variance.double().numpy().ravel()
    assert np.allclose(found[1:], 2 * np.log(sigma.ravel()[1:]), rtol=0, atol=1e-6)
    # the chain adds no noise at t = 0; the likelihood's variance there is that of t = 1, β̃_1
    assert sigma.ravel()[0] == 0
    beta = np.linspace(1e-4, 0.02, T)
    assert found[0] == pytest.approx(np.log(beta[1] * beta[0] / (1 - ALPHA_BAR[1])), abs=1e-6)


def test_large_and_small_variance_are_beta_and_the_posteriors(schedule):
    beta = np.linspace(1e-4, 0.02, T)
    posterior = beta[1:] * (1 - ALPHA_BAR[:-1]) / (1 - ALPHA_BAR[1:])
    x, out = draw(T)
    for variance, wanted in (("fixed_large", beta[1:]), ("fixed_small", posterior)):
        _, log_variance = GaussianDiffusion(schedule, "eps", variance).p_mean_log_variance(x, torch.arange(T), out)
        assert np.allclose(log_variance.exp().ravel().numpy()[1:], wanted, rtol=1e-5)
