"""What is minimised: against closed forms, and the papers' formulas written down again in float64."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: the training objective (no torch)")

import torch

from ddpm_export.training.objective import Objective, level_log_likelihood
from ddpmx.diffusion.samplers import PREDICTIONS
from ddpmx.diffusion.schedule import make_schedule
from ddpmx.errors import InputError

pytestmark = pytest.mark.torch

T = 1000
SHAPE = (2, 3, 4)
BETA = np.linspace(1e-4, 0.02, T)
ALPHA_BAR = np.cumprod(1 - BETA)
BEFORE = np.concatenate([[1.0], ALPHA_BAR[:-1]])
POSTERIOR = BETA * (1 - BEFORE) / (1 - ALPHA_BAR)
POSTERIOR[0] = POSTERIOR[1]  # as Ho et al. clip its logarithm


def draw(n: int, *, seed: int = 0):
    """x_0 of the 256 levels in [−1, 1] and ε ~ N(0, I), float32 [n, C, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(256, (n, *SHAPE), generator=generator)
    return levels / 127.5 - 1, torch.randn(n, *SHAPE, generator=generator)


def column(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, 1, 1, 1)


class Constant(torch.nn.Module):
    """A network with a constant output."""

    def __init__(self, *outputs) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x, t):
        return self.outputs[0] if len(self.outputs) == 1 else self.outputs


def exact(prediction: str, x0, eps, t) -> np.ndarray:
    """The output of a perfect network, in float64."""
    a, before, beta = (column(v[t.numpy()]) for v in (ALPHA_BAR, BEFORE, BETA))
    x0, eps = x0.double().numpy(), eps.double().numpy()
    x_t = np.sqrt(a) * x0 + np.sqrt(1 - a) * eps
    mean = (np.sqrt(before) * beta * x0 + np.sqrt(1 - beta) * (1 - before) * x_t) / (1 - a)
    return {"eps": eps, "x0": x0, "v": np.sqrt(a) * eps - np.sqrt(1 - a) * x0, "mu": mean}[prediction]


def objective(prediction="eps", variance="fixed_large", loss="simple", **how) -> Objective:
    return Objective(make_schedule("linear", T), prediction, variance, loss, **how)


# --- L_simple --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_network_has_no_loss(prediction):
    x0, eps = draw(T)
    t = torch.arange(T)
    out = torch.from_numpy(exact(prediction, x0, eps, t)).float()
    assert objective(prediction)(Constant(out), x0, t, eps).loss.max() < 1e-12


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_of_a_zero_output_is_the_mean_square_of_the_target(prediction):
    x0, eps = draw(T)
    t = torch.arange(T)
    wanted = np.square(exact(prediction, x0, eps, t)).mean((1, 2, 3))
    losses = objective(prediction)(Constant(torch.zeros_like(x0)), x0, t, eps)
    assert losses.loss.dtype == torch.float32
    assert np.allclose(losses.loss.numpy(), wanted, rtol=1e-4, atol=1e-7)
    assert torch.equal(losses.loss, losses.simple)


def test_the_network_gets_the_noisy_image_its_t_and_its_conditioning():
    x0, eps = draw(4)
    t, y = torch.tensor([0, 1, 500, 999]), torch.tensor([3, 1, 2, 0])
    calls = []

    class Recorder(torch.nn.Module):
        def forward(self, x, t, y):
            calls.append((x, t, y))
            return torch.zeros_like(x)

    made = objective()
    made(Recorder(), x0, t, eps, {"y": y})
    ((x, seen_t, seen_y),) = calls
    assert torch.equal(x, made.diffusion.q_sample(x0, t, eps))
    assert torch.equal(seen_t, t)
    assert torch.equal(seen_y, y)


def test_the_loss_is_float32_though_the_output_is_bfloat16():
    x0, eps = draw(8)
    assert objective()(Constant(eps.bfloat16()), x0, torch.arange(8), eps).loss.dtype == torch.float32


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_min_snr_weights_are_those_of_hang_et_al(prediction, gamma):
    snr = ALPHA_BAR / (1 - ALPHA_BAR)
    published = {
        "eps": np.minimum(snr, gamma) / snr,
        "x0": np.minimum(snr, gamma),
        "v": np.minimum(snr, gamma) / (snr + 1),
    }
    weights = objective(prediction, min_snr=gamma).weights.double().numpy()
    assert np.allclose(weights, published[prediction], rtol=1e-6)


def test_min_snr_judges_every_prediction_by_the_same_error_of_x0():
    """Outputs that mean the same x̂_0 have the same loss, whatever is predicted."""
    x0, eps = draw(50)
    t = torch.linspace(0, T - 1, 50).long()
    guess = x0 + 0.1 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(7))
    losses = []
    for prediction in PREDICTIONS:
        made = objective(prediction, min_snr=5.0)
        x_t = made.diffusion.q_sample(x0, t, eps).double()
        p, q = (column(getattr(made.diffusion, name).double().numpy()[t]) for name in ("x0_from_xt", "x0_from_out"))
        out = torch.from_numpy((guess.double().numpy() - p * x_t.numpy()) / q)
        losses.append(made(Constant(out.float()), x0, t, eps).loss.numpy())
    error = np.square((guess - x0).numpy()).mean((1, 2, 3)) * np.minimum(ALPHA_BAR[t] / (1 - ALPHA_BAR[t]), 5.0)
    for loss in losses:
        assert np.allclose(loss, error, rtol=2e-2)


# --- L ---------------------------------------------------------------------------------------------------------------


def kl(mean, variance, mean_p, variance_p):
    """KL of two Gaussians in nats, as in any textbook."""
    return 0.5 * (np.log(variance_p / variance) + (variance + (mean - mean_p) ** 2) / variance_p - 1)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_terms_of_the_bound_are_equations_5_and_13(prediction, variance):
    """Guided-diffusion's ``_vb_terms_bpd``, written down again: bits per dimension, in float64."""
    n = 60
    x0, eps = draw(n)
    t = torch.cat([torch.tensor([0, 0, 1, 2]), torch.linspace(3, T - 1, n - 4).long()])
    wrong = exact(prediction, x0, eps, t) + 0.05 * np.random.default_rng(0).standard_normal(x0.shape)
    out = torch.from_numpy(wrong).float()
    var = torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, x0.shape)).float()
    if variance == "learned":
        var = var + torch.from_numpy(column(np.log(POSTERIOR[t]))).float()
    made = objective(prediction, variance, "vlb")
    outputs = (out, var) if variance.startswith("learned") else (out,)
    found = made(Constant(*outputs), x0, t, eps).loss.double().numpy()

    index = t.numpy()
    a, before, beta = (column(v[index]) for v in (ALPHA_BAR, BEFORE, BETA))
    x, z, v = x0.double().numpy(), eps.double().numpy(), var.double().numpy()
    x_t = np.sqrt(a) * x + np.sqrt(1 - a) * z
    out = out.double().numpy()
    guess = {
        "eps": (x_t - np.sqrt(1 - a) * out) / np.sqrt(a),
        "x0": out,
        "v": np.sqrt(a) * x_t - np.sqrt(1 - a) * out,
        "mu": None,
    }[prediction]

    def posterior_mean(x0):
        return (np.sqrt(before) * beta * x0 + np.sqrt(1 - beta) * (1 - before) * x_t) / (1 - a)

    mean = out if guess is None else posterior_mean(guess)
    large = np.concatenate([[POSTERIOR[1]], BETA[1:]])
    f = (v + 1) / 2
    log_variance = {
        "fixed_small": np.broadcast_to(column(np.log(POSTERIOR[index])), x.shape),
        "fixed_large": np.broadcast_to(column(np.log(large[index])), x.shape),
        "learned": v,
        "learned_range": f * np.log(beta) + (1 - f) * np.log(column(POSTERIOR[index])),
    }[variance]
    terms = kl(posterior_mean(x), column(POSTERIOR[index]), mean, np.exp(log_variance))
    cdf = np.vectorize(NormalDist().cdf)
    sigma = np.exp(0.5 * log_variance)
    above = np.where(x > 0.999, 1.0, cdf((x + 1 / 255 - mean) / sigma))
    below = np.where(x < -0.999, 0.0, cdf((x - 1 / 255 - mean) / sigma))
    with np.errstate(divide="ignore"):
        likelihood = -np.log(above - below)
    first = (index == 0)[:, None, None, None]
    wanted = np.where(first, likelihood, terms).mean((1, 2, 3)) / math.log(2)
    usable = np.isfinite(wanted)  # float64's Φ is 0 from 38 σ on, where ours is not
    assert usable[index > 0].all()
    assert np.allclose(found[usable], wanted[usable], rtol=2e-3, atol=2e-4)


def test_the_likelihood_of_a_level_keeps_its_digits_in_the_tails():
    """Against log of the integral by the mean value: the density is almost constant over a narrow level."""
    x0 = torch.tensor([10 / 127.5 - 1, 100 / 127.5 - 1, 250 / 127.5 - 1], dtype=torch.float32)
    for sigma, shift in ((0.05, 0.0), (0.05, 0.5), (0.05, -0.5), (1.0, 1.5)):
        mean = x0 + shift
        found = level_log_likelihood(x0, mean, torch.full_like(x0, math.log(sigma))).double()
        grid = torch.linspace(-1, 1, 20_001, dtype=torch.float64) / 255
        z = (grid[None] - shift) / sigma
        density = -0.5 * z**2 - math.log(sigma * math.sqrt(2 * math.pi))
        wanted = torch.logsumexp(density, 1) + math.log(2 / 255 / 20_001)
        assert torch.allclose(found, wanted.expand(3), rtol=2e-4), (sigma, shift)
    far = level_log_likelihood(x0, x0 + 30, torch.full_like(x0, math.log(0.05)))
    assert torch.isfinite(far).all()


def test_all_levels_together_have_the_probability_1():
    x0 = (torch.arange(256) / 127.5 - 1).double()
    for mean, sigma in ((0.0, 0.3), (0.99, 0.02), (-2.0, 1.0)):
        logs = level_log_likelihood(x0, torch.full_like(x0, mean), torch.full_like(x0, math.log(sigma)))
        assert logs.exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_the_optimal_learned_variance_is_the_posterior_s_plus_the_square_of_the_error():
    """The gradient of a term of L by log σ² is 0 where σ² = β̃ + (μ̃ − μ)², as for any Gaussian."""
    x0, eps = draw(8)
    t = torch.full((8,), 500)
    made = objective("eps", "learned", "vlb")
    out = eps + 0.3
    x_t = made.diffusion.q_sample(x0, t, eps)
    mean = made.diffusion.p_mean_log_variance(x_t, t, out, torch.zeros_like(x0), clip=None)[0]
    error = (made.diffusion.posterior_mean(x0, t, x_t) - mean).square()
    var = torch.log(POSTERIOR[500] + error).requires_grad_()
    made(Constant(out, var), x0, t, eps).loss.sum().backward()
    at_optimum = var.grad.abs().max()
    shifted = (var.detach() + 0.1).requires_grad_()
    made(Constant(out, shifted), x0, t, eps).loss.sum().backward()
    assert at_optimum < 1e-3 * shifted.grad.abs().min()


def test_the_prior_term_is_about_what_the_paper_says():
    """L_T of the linear schedule is of the order of 1e-5 bits per dimension (Ho et al., §4.1)."""
    x0, _ = draw(32)
    found = objective().prior_term(x0)
    a = ALPHA_BAR[-1]
    wanted = kl(np.sqrt(a) * x0.double().numpy(), 1 - a, 0.0, 1.0).mean((1, 2, 3)) / math.log(2)
    assert np.allclose(found.numpy(), wanted, rtol=0.05, atol=1e-7)
    assert 1e-6 < found.mean() < 1e-4


# --- L_hybrid --------------------------------------------------------------------------------------------------------


def test_hybrid_is_the_sum_and_gives_the_mean_no_gradient_of_the_bound():
    x0, eps = draw(6)
    t = torch.tensor([0, 1, 10, 100, 500, 999])
    out = (eps + 0.1).requires_grad_()
    var = torch.zeros_like(x0).requires_grad_()
    made = objective("eps", "learned_range", "hybrid")
    losses = made(Constant(out, var), x0, t, eps)
    bound = objective("eps", "learned_range", "vlb")(Constant(out, var), x0, t, eps).loss
    # L = Σ_t L_t is T times a term of uniform t; λ = 0.001 of it is added (Nichol & Dhariwal 2021, §3.1)
    assert torch.allclose(losses.loss, losses.simple + 0.001 * T * bound.detach(), rtol=1e-5)
    losses.loss.sum().backward()
    assert torch.allclose(out.grad, 2 * (out - eps).detach() / math.prod(SHAPE), rtol=1e-4), "of L_simple alone"
    assert var.grad.abs().min() > 0
    control = (eps + 0.1).requires_grad_()
    objective("eps", "learned_range", "vlb")(Constant(control, var.detach()), x0, t, eps).loss.sum().backward()
    assert control.grad.abs().max() > 0, "control: the bound itself has a gradient by the mean"


@pytest.mark.parametrize(
    ("variance", "loss", "min_snr", "says"),
    [
        ("fixed_large", "mse", None, "there is no loss"),
        ("learned", "simple", None, "does not train the variance"),
        ("learned_range", "simple", None, "does not train the variance"),
        ("fixed_small", "hybrid", None, "is for a learned variance"),
        ("learned", "vlb", 5.0, "no effect"),
        ("fixed_large", "simple", 0.0, "above 0"),
        ("fixed_large", "simple", math.inf, "above 0"),
    ],
)
def test_combinations_that_train_nothing(variance, loss, min_snr, says):
    with pytest.raises(InputError, match=says):
        objective("eps", variance, loss, min_snr=min_snr)
