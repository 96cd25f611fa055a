"""The score view against closed forms: Gaussians and mixtures whose score, density and flow are known."""

from __future__ import annotations

import importlib.util
import math
import sys
from statistics import NormalDist

import numpy as np
import pytest

from ddpmx.errors import BackendError, Cancelled, InputError, NumericError
from ddpmx.pipeline import Pipeline
from ddpmx.sampling.pixels import to_nhwc
from ddpmx.tasks import flow, score
from ddpmx.tasks.continuous import Between, alpha_bar, levels
from ddpmx.tasks.invert import invert
from oracles import gaussian
from oracles.toy_backend import ToyBackend

SHAPE = gaussian.SHAPE
SIZE = math.prod(SHAPE)
SPEC = gaussian.SPEC
HO = SPEC.make_schedule()
PHI = np.vectorize(NormalDist().cdf, otypes=[float])


class Known:
    """A network that knows E[ε | x_t] of independent pixels with the density ½N(−m, s²) + ½N(m, s²) around ``centre``."""

    description = "known"

    def __init__(self, spec, m=0.4, s=0.1, centre=0.1) -> None:
        self.schedule, self.m, self.s, self.centre = spec.make_schedule(), m, s, centre

    def bind(self, buffers):
        self.buffers = buffers

    def enqueue(self):
        alpha_bar = self.schedule.alpha_bar[self.buffers.t].reshape(-1, 1, 1, 1)
        signal, noise = np.sqrt(alpha_bar), 1 - alpha_bar
        x, variance = self.buffers.x.astype(np.float64), alpha_bar * self.s**2 + noise
        apart = [x - signal * (self.centre + sign * self.m) for sign in (-1, 1)]
        share = 1 / (1 + np.exp(np.clip((apart[1] ** 2 - apart[0] ** 2) / (2 * variance), -700, 700)))
        # a share of 1 means the upper mode; score = −(x − its mean)/variance
        gradient = -(share * apart[1] + (1 - share) * apart[0]) / variance
        self.buffers.out[...] = -np.sqrt(noise) * gradient

    def close(self):
        pass

    def cdf(self, x, widening):
        """Of the images with noise of this standard deviation."""
        s = math.hypot(self.s, widening)
        return np.mean([PHI((x - self.centre - sign * self.m) / s) for sign in (-1, 1)], axis=0)

    def log_density(self, x, widening):
        s = math.hypot(self.s, widening)
        parts = [-0.5 * ((x - self.centre - sign * self.m) / s) ** 2 for sign in (-1, 1)]
        return np.logaddexp(*parts) - math.log(2 * s * math.sqrt(2 * math.pi))


def toy(spec=SPEC, **faults):
    return Pipeline(spec, ToyBackend(**faults))


def known(spec=SPEC, **shape):
    return Pipeline(spec, Known(spec, **shape))


needs_scipy = pytest.mark.skipif(
    importlib.util.find_spec("scipy") is None, reason="not verified here: the probability-flow ODE (no scipy)"
)
FIRST = math.exp(levels(HO)[0])
"""Noise of x̄ = x/√ᾱ at t = 0."""


def ks(samples, cdf):
    """The largest difference of the samples' distribution and a known one (Kolmogorov and Smirnov)."""
    x = np.sort(samples.ravel())
    below = cdf(x)
    return max(np.max(np.arange(1, len(x) + 1) / len(x) - below), np.max(below - np.arange(len(x)) / len(x)))


def spread_over_levels(images):
    return (images + np.random.default_rng(0).uniform(0, 1, images.shape)) / 127.5 - 1 - 1 / 255


# --- the score, and levels between the timesteps ---------------------------------------------------------------------


def test_the_score_is_the_gradient_of_the_log_density():
    t = np.array([0, 3, 400, 999])
    x = np.random.default_rng(0).standard_normal((4, *SHAPE)).astype(np.float32)
    with known() as pipeline:
        found = score.score(pipeline, x, t)
    for i, now in enumerate(t):
        signal, noise, net = math.sqrt(HO.alpha_bar[now]), math.sqrt(HO.one_minus_alpha_bar[now]), Known(SPEC)
        scaled, h = x[i].astype(float) / signal, 1e-4 * math.hypot(0.1, noise / signal)
        slope = (net.log_density(scaled + h, noise / signal) - net.log_density(scaled - h, noise / signal)) / (2 * h)
        np.testing.assert_allclose(found[i], slope / signal, rtol=5e-3, atol=5e-3 * np.abs(slope / signal).max())


def test_levels_are_those_of_the_timesteps_and_between_them_linear():
    with toy() as pipeline:
        network = Between(pipeline)
        assert np.all(np.diff(network.levels) > 0)
        np.testing.assert_allclose([alpha_bar(level) for level in network.levels], HO.alpha_bar, rtol=1e-9)
        assert network.neighbours(network.levels[0]) == [(0, 1.0)]
        assert network.neighbours(network.levels[0] - 5) == [(0, 1.0)]
        assert network.neighbours(network.levels[999] + 1) == [(999, 1.0)]
        assert network.neighbours(network.levels[500]) == [(500, 1.0)]
        middle = 0.75 * network.levels[500] + 0.25 * network.levels[501]
        assert [(t, pytest.approx(share)) for t, share in network.neighbours(middle)] == [(500, 0.75), (501, 0.25)]
        x = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
        both = [pipeline.evaluate(x, t).eps for t in (500, 501)]
        np.testing.assert_allclose(network.eps(x, middle), 0.75 * both[0] + 0.25 * both[1], atol=1e-6)
        assert network.calls == 4


# --- the reverse SDE -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corrections", [0, 1])
def test_the_sde_draws_the_known_distribution(corrections):
    """Of 24,576 values the 1 % point of KS is 0.0104; a shift of the modes by a fifth of their width gives 0.04."""
    net = Known(SPEC)
    with known() as pipeline:
        images = score.sde(pipeline, 128, steps=250, corrections=corrections, seed=3)
    assert ks(spread_over_levels(images), lambda x: net.cdf(x, 0)) < 0.018
    shifted = Known(SPEC, centre=0.12)
    assert ks(spread_over_levels(images), lambda x: shifted.cdf(x, 0)) > 0.03


def test_steps_that_are_too_long_for_euler_are_cut():
    """The cosine schedule's last step has ∫β = 6.9, with which Euler's step would multiply x by −2.5."""
    spec = SPEC.replace(schedule="cosine", schedule_params={}, timesteps=200)
    net = Known(spec)
    seen = []
    with known(spec) as pipeline:
        images = score.sde(pipeline, 64, progress=lambda *now: seen.append(now))
    assert ks(spread_over_levels(images), lambda x: net.cdf(x, 0)) < 0.03
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]
    assert len(seen) > 200


@pytest.mark.parametrize("corrections", [0, 2])
def test_an_image_of_the_sde_does_not_depend_on_the_others(corrections):
    how = {"steps": 10, "corrections": corrections, "seed": 5}
    with toy() as pipeline:
        several = score.sde(pipeline, 5, **how)
        np.testing.assert_array_equal(score.sde(pipeline, 2, first=3, **how), several[3:])
        np.testing.assert_array_equal(score.sde(pipeline, 5, batch=2, **how), several)
        assert np.any(score.sde(pipeline, 5, **{**how, "seed": 6}) != several)


# --- the ODE ---------------------------------------------------------------------------------------------------------


@needs_scipy
def test_the_flow_takes_quantiles_to_quantiles():
    """Of Gaussian data (x_t − mean)/deviation stays what it is."""
    images = to_nhwc(
        (gaussian.MU + gaussian.S * np.random.default_rng(0).standard_normal((2, *SHAPE))).astype(np.float32)
    )
    with toy() as pipeline:
        found = flow.encode(pipeline, images, tolerance=1e-5)
        x = images.transpose(0, 3, 1, 2) / 127.5 - 1
        place = (x - gaussian.MU) / math.hypot(gaussian.S, FIRST)
        mean = math.sqrt(HO.alpha_bar[-1]) * gaussian.MU
        deviation = math.sqrt(HO.alpha_bar[-1] * gaussian.S**2 + HO.one_minus_alpha_bar[-1])
        np.testing.assert_allclose(found.x, mean + deviation * place, atol=2e-3)
        assert found.log_p is None
        again = flow.decode(pipeline, found.x, tolerance=1e-5)
        # x̂_0 at the end is nearer to the mean than x̄ is, by s²/(s² + noise²) of the way
        wanted = gaussian.MU + (x - gaussian.MU) * gaussian.S**2 / (gaussian.S**2 + FIRST**2)
        assert np.abs(again.transpose(0, 3, 1, 2) / 127.5 - 1 - wanted).max() < 1.2 / 127.5


@needs_scipy
@pytest.mark.parametrize("what", ["gaussian", "mixture"])
def test_the_likelihood_of_the_flow_is_the_density(what):
    """Pixels are independent, so that the probe of signs is exact and only the ODE and the differences err."""
    rng = np.random.default_rng(1)
    if what == "gaussian":
        x = gaussian.MU + gaussian.S * rng.standard_normal((2, *SHAPE))
        pipeline = toy()
    else:
        x = 0.1 + 0.4 * rng.choice([-1, 1], (2, *SHAPE)) + 0.1 * rng.standard_normal((2, *SHAPE))
        pipeline = known()
    images = to_nhwc(x.astype(np.float32))
    with pipeline:
        found = flow.encode(pipeline, images, likelihood=True, tolerance=1e-5, seed=4)
    moved = images.transpose(0, 3, 1, 2) / 127.5 - 1 + flow._within_levels(4, 0, 2, SHAPE)
    if what == "gaussian":
        s = math.hypot(gaussian.S, FIRST)
        log_p = -0.5 * ((moved - gaussian.MU) / s) ** 2 - math.log(s * math.sqrt(2 * math.pi))
    else:
        log_p = Known(SPEC).log_density(moved, FIRST)
    wanted = log_p.reshape(2, -1).sum(axis=1)
    assert found.log_p == pytest.approx(wanted, abs=0.004 * SIZE)
    assert found.bits_per_dim == pytest.approx(-wanted / SIZE / math.log(2) + math.log2(127.5), abs=0.006)
    assert np.abs(moved - (images.transpose(0, 3, 1, 2) / 127.5 - 1)).max() <= 1 / 255


@needs_scipy
def test_a_divergence_that_is_known_takes_the_place_of_differences():
    """The slope of the Gaussian's ε̂ is the same everywhere."""
    slope, _ = gaussian.coefficients(HO)
    images = np.full((1, 8, 8, 3), 128, np.uint8)

    def divergence(x, t, probe, index):
        return np.array([slope[t] * np.square(probe, dtype=np.float64).sum()])

    with toy() as pipeline:
        exact = flow.encode(pipeline, images, likelihood=True, divergence=divergence)
        near = flow.encode(pipeline, images, likelihood=True)
    assert exact.log_p == pytest.approx(near.log_p, abs=0.002 * SIZE)
    assert exact.calls < 0.5 * near.calls


@needs_scipy
def test_an_image_of_the_flow_does_not_depend_on_the_others():
    with toy() as pipeline:
        several = flow.sample(pipeline, 3, seed=5)
        np.testing.assert_array_equal(flow.sample(pipeline, 1, seed=5, first=2), several[2:])
        found = flow.encode(pipeline, several)
        np.testing.assert_array_equal(flow.encode(pipeline, several[1:2], first=1).x, found.x[1:2])
    values = several.transpose(0, 3, 1, 2) / 127.5 - 1 - gaussian.MU
    assert values.std() == pytest.approx(gaussian.S, rel=0.1)


# --- DDIM inversion --------------------------------------------------------------------------------------------------


def test_inversion_is_undone_by_the_chain():
    images = to_nhwc(
        (gaussian.MU + gaussian.S * np.random.default_rng(0).standard_normal((2, *SHAPE))).astype(np.float32)
    )
    apart = []
    with toy() as pipeline:
        for iterations in (1, 2, 40):
            x = invert(pipeline, images, steps=20, iterations=iterations)
            again = pipeline.generate(2, x=x, steps=20, sampler="ddim")
            apart.append(np.abs(again.astype(int) - images).mean())
    assert apart[0] > apart[1] > apart[2]
    assert apart[2] < 0.1


@pytest.mark.parametrize("spacing", ["linspace", "logsnr", "karras"])
def test_spacings_are_those_of_the_chain(spacing):
    images = np.full((1, 8, 8, 3), 128, np.uint8)
    with toy() as pipeline:
        visited = sorted(pipeline.table(sampler="ddim", steps=9, spacing=spacing).timesteps)
        backend = pipeline._runner._backend
        for work in (
            lambda: invert(pipeline, images, steps=9, spacing=spacing, iterations=1),
            lambda: score.sde(pipeline, 1, steps=9, spacing=spacing),
        ):
            backend.calls.clear()
            work()
            assert set(visited) <= {t for t, _ in backend.calls}


# --- what is refused -------------------------------------------------------------------------------------------------


IMAGES = np.zeros((1, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: score.sde(p, steps=0), "steps must be"),
        (lambda p: score.sde(p, corrections=-1), "corrections must be"),
        (lambda p: score.sde(p, ratio=0.0), "ratio must be"),
        (lambda p: score.sde(p, ratio=float("nan")), "ratio must be"),
        (lambda p: score.sde(p, 0), "n must be"),
        (lambda p: score.sde(p, steps=20, spacing="trailing"), "not at 0"),
        (lambda p: flow.encode(p, IMAGES[:, :4]), "images must be uint8"),
        (lambda p: flow.encode(p, IMAGES.astype(np.float32)), "images must be uint8"),
        (lambda p: flow.encode(p, IMAGES, tolerance=0.0), "tolerance must be"),
        (lambda p: flow.Encoded(np.zeros((1, 3, 8, 8)), None, 1).bits_per_dim, "log p was not computed"),
        (lambda p: flow.decode(p, np.zeros((1, 3, 8, 4), np.float32)), "x must be float32"),
        (lambda p: invert(p, IMAGES, iterations=0), "iterations must be"),
        (lambda p: invert(p, IMAGES[:, :, :2]), "images must be uint8"),
        (lambda p: invert(p, IMAGES, labels=1), "no classes"),
    ],
)
def test_wrong_input_is_one_clear_error(call, message):
    with toy() as pipeline, pytest.raises(InputError, match=message):
        call(pipeline)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SPEC.replace(schedule="jsd", schedule_params={}, prediction="x0"), "ends at ᾱ = 0"),
        (SPEC.replace(self_condition=True), "x̂_0 of the step before"),
    ],
)
def test_models_without_a_flow_are_refused(spec, message):
    for call in (lambda p: score.sde(p), lambda p: flow.encode(p, IMAGES), lambda p: invert(p, IMAGES)):
        with toy(spec) as pipeline, pytest.raises(InputError, match=message):
            call(pipeline)


@needs_scipy
def test_differences_of_half_precision_are_refused():
    with toy(SPEC.replace(precision="fp16")) as pipeline:
        with pytest.raises(InputError, match="lost in rounding"):
            flow.encode(pipeline, IMAGES, likelihood=True)
        flow.encode(pipeline, IMAGES, likelihood=True, divergence=lambda x, t, v, i: np.zeros(1))


@needs_scipy
def test_work_can_be_cancelled_and_faults_are_named():
    def after(n):
        seen = []
        return lambda: seen.append(0) or len(seen) > n

    calls = (score.sde, lambda p, **how: flow.encode(p, IMAGES, **how), lambda p, **how: invert(p, IMAGES, **how))
    for call in calls:
        with toy() as pipeline, pytest.raises(Cancelled):
            call(pipeline, cancel=after(3))
        with toy(poison=(0, math.nan)) as pipeline, pytest.raises(NumericError, match="t = 0 is not finite"):
            call(pipeline)


def test_scipy_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)
    with toy() as pipeline, pytest.raises(BackendError, match="scipy, which is missing") as refused:
        flow.encode(pipeline, IMAGES)
    assert "ddpmx[flow]" in refused.value.hint
