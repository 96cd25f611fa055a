"""Variations of images, on Gaussian data: what comes of an image is then known."""

from __future__ import annotations

import numpy as np
import pytest

from ddpmx import ModelSpec, Sampling
from ddpmx.diffusion.noise import Purpose, normal
from ddpmx.errors import InputError
from ddpmx.pipeline import Pipeline
from ddpmx.tasks.variations import begin, variations
from oracles.correlated import Correlated, smooth

SHAPE = (1, 3, 4)
SPEC = ModelSpec(SHAPE, timesteps=100, schedule="cosine", clip=None, variance="fixed_small")
MEAN = np.linspace(-0.2, 0.2, 12).reshape(SHAPE)
COVARIANCE = smooth(SHAPE, deviation=0.25)
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 1), dtype=np.uint8)


def model(spec=SPEC, **faults):
    return Pipeline(spec, Correlated(spec, MEAN, COVARIANCE, **faults))


def test_a_variation_has_the_known_distribution(figure):
    """x_t ~ q(x_t | x_0), and then the posterior N(μ + G·(x_t/√ᾱ − μ), Σ − G·Σ) with G = Σ·(Σ + σ_t²·I)⁻¹: its mean is
    μ + G·(x_0 − μ), and its covariance Σ − G·Σ + σ_t²·G·Gᵀ.
    """
    n, strength = 600, 0.4
    images = np.repeat(IMAGES[:1], n, axis=0)
    with model() as pipeline:
        begun = begin(pipeline, images, strength)
        drawn = variations(pipeline, images, strength, batch=n)[..., 0].reshape(n, -1) / 127.5 - 1
    assert begun.sampling.start == 39
    kept = SPEC.make_schedule().alpha_bar[39]
    gain = COVARIANCE @ np.linalg.inv(COVARIANCE + (1 - kept) / kept * np.eye(12))
    mean = MEAN.reshape(-1) + gain @ (IMAGES[0].reshape(-1) / 127.5 - 1 - MEAN.reshape(-1))
    covariance = COVARIANCE - gain @ COVARIANCE + (1 - kept) / kept * gain @ gain.T
    off = (drawn.mean(0) - mean) / np.sqrt(np.diag(covariance) / n)
    figure("mean of variations, in standard errors, RMS", np.sqrt(np.mean(off**2)), at_most=1.8)
    figure(
        "their covariance, by the largest", np.abs(np.cov(drawn.T) - covariance).max() / covariance.max(), at_most=0.2
    )
    without = (drawn.mean(0) - MEAN.reshape(-1)) / np.sqrt(np.diag(covariance) / n)
    assert np.sqrt(np.mean(without**2)) > 5  # control: the image matters


def test_the_noise_is_the_image_s_own_and_no_step_s():
    with model() as pipeline:
        x, sampling = begin(pipeline, IMAGES, 0.5, seed=3, first=7)
        t = sampling.start
        kept = SPEC.make_schedule().alpha_bar[t]
        z = normal(3, np.arange(7, 12), t, Purpose.DIFFUSE, 12).reshape(x.shape)
        x0 = IMAGES.transpose(0, 3, 1, 2) / 127.5 - 1
        assert np.abs(x - (np.sqrt(kept) * x0 + np.sqrt(1 - kept) * z)).max() < 1e-6
        again = begin(pipeline, IMAGES[3:], 0.5, seed=3, first=10).x
        assert np.array_equal(again, x[3:])


@pytest.mark.parametrize("sways", [None, "size", "place"])
def test_an_image_does_not_depend_on_its_neighbours(sways):
    labels, how = np.array([0, 4, 2, 1, 3]), {"strength": 0.3, "batch": 2, "guidance": 1.5}
    with model(SPEC.replace(classes=5, null_class=True), sways=sways) as pipeline:
        whole = variations(pipeline, IMAGES, labels=labels, **how)
        for i in (0, 3):
            alone = variations(pipeline, IMAGES[i : i + 1], labels=labels[i : i + 1], first=i, **how)
            assert np.array_equal(alone[0], whole[i])


@pytest.mark.parametrize(
    ("strength", "sampling", "t"),
    [
        (1, None, 99),
        (0.5, None, 49),
        (0.001, None, 0),
        (0.5, Sampling(sampler="ddim", steps=5), 50),
        (1.0, Sampling(steps=7), 99),
    ],
)
def test_where_the_chain_begins(strength, sampling, t, recwarn):
    with model() as pipeline:
        assert begin(pipeline, IMAGES, strength, sampling=sampling).sampling.start == t
        variations(pipeline, IMAGES, strength, sampling=sampling)
    assert not recwarn.list, "the timestep is one that the chain visits"


WRONG = {
    "no strength": ({"strength": 0}, "strength must be above 0"),
    "too strong": ({"strength": 1.1}, "strength must be above 0 and at most 1"),
    "no number": ({"strength": float("nan")}, "strength must be above 0"),
    "another size": ({"images": IMAGES[:, :2]}, r"images must be uint8 \[n, 3, 4, 1\]"),
    "floats": ({"images": IMAGES / 255}, "images must be uint8"),
    "none": ({"images": IMAGES[:0]}, "images must be uint8"),
    "a start": ({"sampling": Sampling(start=3)}, "start and strength exclude each other"),
    "a seed": ({"seed": -1}, "the seed must be"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_refused(wrong):
    changed, message = WRONG[wrong]
    with model() as pipeline, pytest.raises(InputError, match=message):
        variations(pipeline, **{"images": IMAGES, **changed})
